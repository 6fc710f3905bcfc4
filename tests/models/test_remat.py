"""Rematerialization changes the values kept for the backward pass, and no result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import Sequences
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.rollout.score import end_scores
from tests.models.gpt2_folders import random_params
from tests.versions import newest

PLAIN = GPT2(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2), remat="none")
PARAMS = random_params(PLAIN)
HEAD = {"kernel": jnp.arange(1.0, 9.0)}
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 2, 4))
MASK = np.arange(4) < np.array([[4, 2], [1, 3]])[..., None]
KEY = jax.random.key(5)


def with_remat(remat, model=PLAIN):
    return dataclasses.replace(model, remat=remat)


def text_loss(model, params):
    """A loss under dropout, whose masks are made again in the backward pass."""
    hidden = model.hidden(params, TOKENS[:, 0], MASK[:, 0], dropout_key=KEY)
    return jnp.sum(jnp.sin(model.logits(params, hidden)))


def score_loss(model, params):
    """One of a reward model, whose prompts go through a cache."""
    full = {"model": params, "head": HEAD}
    prompts = np.ones((2, 3), np.int32)
    return jnp.sum(jnp.sin(end_scores(model, full, Sequences(prompts, prompts > 0, TOKENS, MASK))))


@pytest.fixture(scope="module")
def gradients():
    """gradients(loss, remat) -> (loss, gradients), once each."""
    results = {}

    def of(loss, remat):
        if (loss, remat) not in results:
            step = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
            results[loss, remat] = step(with_remat(remat), PARAMS)
        return results[loss, remat]

    return of


@pytest.mark.parametrize(
    ("loss", "remat"),
    [(text_loss, "full"), *newest((text_loss, "dots"), (score_loss, "full"))],
)
def test_losses_and_gradients_are_the_same(gradients, loss, remat):
    expected = gradients(loss, "none")
    assert float(jnp.abs(expected[1]["layers"]["mlp"]["c_fc"]["kernel"]).max()) > 0.01
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        gradients(loss, remat),
        expected,
    )


def temporary(remat):
    """Bytes of temporary arrays of a gradient over many layers, compiled and not run."""
    model = with_remat(remat, GPT2(dataclasses.replace(PLAIN.config, n_layer=12)))
    shapes = jax.eval_shape(model.init, KEY)

    def loss(params, tokens):
        return jnp.sum(model.hidden(params, tokens) ** 2)

    tokens = jax.ShapeDtypeStruct((64, 16), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(shapes, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.newest
def test_less_is_kept():
    none, dots, full = map(temporary, ("none", "dots", "full"))
    assert full < 0.25 * none
    assert full < dots < 0.75 * none


def test_decoding_and_equality():
    """It is part of a model, so that equal models share a trace, and of no folder."""
    assert with_remat("full") != PLAIN
    assert with_remat("none") == PLAIN
    with pytest.raises(InputError, match="model.remat must be none, full or dots, but is 'some'"):
        with_remat("some")
