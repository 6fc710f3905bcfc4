"""Accumulated gradients: the step of the full batch, however unequal its parts are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import TextBatch
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.training import reward, sft
from rlhf_jax.training.epochs import accumulated_gradients
from tests.models.tiny_gpt2 import busy_params
from tests.training.test_reward import PAIRS, batch_of
from tests.training.test_reward_objectives import RANKINGS, rankings_of

SGD = optax.sgd(0.1)
KEY = jax.random.key(3)
OBJECTIVES = ("sft", "last_token", "tokenwise", "ranking")
# A sequence of each length; the last half has nearly no targets.
LENGTHS = (8, 7, 3, 2)


@pytest.fixture(scope="module")
def small():
    return GPT2(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=1))


@pytest.fixture(scope="module")
def texts():
    real = np.arange(8) < np.array(LENGTHS)[:, None]
    tokens = np.random.default_rng(0).integers(0, 11, real.shape)
    targets = real & (np.arange(8) > 0)
    return TextBatch(*map(jnp.asarray, (tokens.astype(np.int32), real.astype(np.int32), targets)))


@pytest.fixture(scope="module")
def run(small, texts):
    """run(what, steps) -> (parameters, metrics) after one step on the full batch."""
    trunk = busy_params(small, 2)
    head = {"kernel": jnp.asarray(np.random.default_rng(3).normal(size=8), jnp.float32)}

    def run_step(what, steps):
        stage, params, batch = reward, {"model": trunk, "head": head}, batch_of(PAIRS, 4)
        if what == "sft":
            settings = sft.Settings(batch_size=4, gradient_accumulation_steps=steps, dropout=False)
            stage, params, batch = sft, trunk, texts
        else:
            settings = reward.Settings(
                objective=what,
                batch_size=4,
                gradient_accumulation_steps=steps,
                center_coef=0.1 * (what == "last_token"),
            )
        if what == "ranking":  # four, two and three responses, and an example that is no ranking
            batch = rankings_of(RANKINGS, 4)
        elif what != "sft":  # three pairs, and an example that is none
            batch = batch_of(PAIRS[:3], 4)
        state = stage.init_state(small, params, settings, KEY, optimizer=SGD)
        state, metrics = jax.jit(stage.make_step(small, settings, optimizer=SGD))(state, batch, KEY)
        return state.params, metrics

    return run_step


@pytest.mark.newest
@pytest.mark.parametrize("what", OBJECTIVES)
def test_the_step_is_that_of_the_full_batch(run, what):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        run(what, 4 if what == "sft" else 2),
        run(what, 1),
    )


@pytest.mark.newest
def test_every_part_has_its_own_dropout_and_is_run_alone(small, texts):
    """Against a loop over the parts: strided examples, own keys, and the count of the batch."""
    model = GPT2(dataclasses.replace(small.config, resid_pdrop=0.5, embd_pdrop=0.5))
    params = busy_params(small, 2)

    def loss_fn(params, part, key, denominator):
        return sft._loss(model, sft.Settings(), None, params, part, key, denominator)

    @jax.jit
    def accumulate(params, key):
        return accumulated_gradients(loss_fn, sft.count_targets, params, texts, key, 2)

    @jax.jit
    def alone(params, part, key):
        return jax.grad(loss_fn, has_aux=True)(params, part, key, sft.count_targets(texts))

    keys = jax.random.split(KEY, 2)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], texts) for i in range(2)]
    sums = [alone(params, part, key) for part, key in zip(parts, keys, strict=True)]
    expected = jax.tree.map(jnp.add, *sums)
    assert_close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(assert_close, accumulate(params, KEY), expected)
    same_key = [alone(params, part, keys[0]) for part in parts]
    total = sum(float(metrics["loss"]) for _, metrics in same_key)
    assert abs(total - float(expected[1]["loss"])) > 1e-3


@pytest.mark.newest
def test_memory_falls_with_the_parts(small, texts):
    """Activations for the backward pass are those of one part."""
    batch = jax.tree.map(lambda x: jnp.tile(x, (16, 1)), texts)

    def temporary(steps):
        settings = sft.Settings(batch_size=64, gradient_accumulation_steps=steps, dropout=False)
        state = jax.eval_shape(
            lambda: sft.init_state(small, small.init(KEY), settings, KEY, optimizer=SGD)
        )
        step = jax.jit(sft.make_step(small, settings, optimizer=SGD))
        return step.lower(state, batch, KEY).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.5 * temporary(1)


@pytest.mark.parametrize(("stage", "name"), [(sft, "sft"), (reward, "reward")])
def test_settings_that_do_not_divide_are_refused(stage, name):
    with pytest.raises(InputError, match=f"{name}.batch_size = 6 is not divisible by {name}.grad"):
        stage.Settings(batch_size=6, gradient_accumulation_steps=4)
    with pytest.raises(InputError, match=f"{name}.gradient_accumulation_steps must be above 0"):
        stage.Settings(gradient_accumulation_steps=0)


def test_a_batch_that_does_not_divide_is_an_error(texts):
    with pytest.raises(ValueError, match="4 examples are not divisible by 3 accumulation steps"):
        accumulated_gradients(lambda *_: None, sft.count_targets, {}, texts, None, 3)
