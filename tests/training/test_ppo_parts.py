"""PPO whose minibatches are run in parts, and whose responses are scored in parts: the same PPO."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import PromptBatch, Rollout, TextBatch
from rlhf_jax.errors import InputError
from rlhf_jax.training import ppo
from rlhf_jax.training.epochs import map_microbatches
from tests.training.ppo_by_loop import KEY, SCORES, SETTINGS, SGD, update_with

IN_PARTS = {"gradient_accumulation_steps": 2, "score_batch_size": 2}
WITH_TEXTS = {"entropy_coef": 0.1, "ptx_coef": 0.5, "ptx_batch_size": 6, "max_approxkl": 10.0}
FROZEN_BASE = {
    "surrogate": "kl_penalty",
    "exact_kl": True,
    "num_layers_unfrozen": 1,
    "value_model": "policy",
    "num_ppo_epochs": 2,
}


@pytest.fixture(scope="module")
def texts():
    """Rows of other lengths, and of another number, than the responses."""
    real = np.arange(6) < np.array([6, 5, 2, 3, 6, 1])[:, None]
    tokens = np.random.default_rng(0).integers(0, 10, real.shape)
    return TextBatch(*map(jnp.asarray, (tokens.astype(np.int32), real.astype(np.int32), real)))


@pytest.mark.newest
@pytest.mark.parametrize("options", [WITH_TEXTS, FROZEN_BASE], ids=["texts", "frozen"])
def test_the_step_equals_its_parts_in_sequence(model, params, batch, rollout, texts, options):
    settings = dataclasses.replace(SETTINGS, **options)
    state = ppo.init_state(model, params, settings, KEY, optimizer=SGD)
    batch = batch._replace(texts=texts)
    full, parts = (
        update_with(model, each)(state, batch, rollout, SCORES, KEY)
        for each in (settings, dataclasses.replace(settings, **IN_PARTS))
    )
    before = jax.tree.leaves(state.params)
    moved = [np.abs(x - y).max() for x, y in zip(jax.tree.leaves(full[0].params), before)]
    assert max(moved) > 0.01
    assert full[1].keys() == parts[1].keys()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), parts, full)


@pytest.mark.newest
def test_memory_falls_with_the_parts(model):
    """Activations for the backward pass are those of one part, and so are the logits of scoring."""
    settings = dataclasses.replace(SETTINGS, batch_size=64)
    shape = jax.ShapeDtypeStruct
    entries = (shape((64, 4), jnp.int32), shape((64, 4), bool), shape((64,), jnp.int32))
    batch = PromptBatch(*entries)
    responses = Rollout(
        shape((64, 5), jnp.int32), shape((64, 5), bool), shape((64, 5), jnp.float32)
    )
    state = jax.eval_shape(
        lambda: ppo.init_state(model, model.init(KEY), settings, KEY, optimizer=SGD)
    )

    def temporary(**options):
        update = update_with(model, dataclasses.replace(settings, **options))
        lowered = update.lower(state, batch, responses, shape((64,), jnp.float32), KEY)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    parts = temporary(gradient_accumulation_steps=8, score_batch_size=8)
    assert parts < 0.5 * temporary()


def test_examples_come_back_in_their_order():
    entries = (jnp.arange(6), jnp.arange(12).reshape(6, 2))
    actual = map_microbatches(
        lambda entries: (entries[0] + 1, None, entries[1].sum(axis=1)), entries, 3
    )
    np.testing.assert_array_equal(actual[0], np.arange(6) + 1)
    np.testing.assert_array_equal(actual[2], np.arange(12).reshape(6, 2).sum(axis=1))
    with pytest.raises(ValueError, match="6 examples are not divisible by 4"):
        map_microbatches(lambda entries: entries, entries, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"gradient_accumulation_steps": 3},
            "ppo.batch_size = 8 is not divisible by ppo.gradient_accumulation_steps = 3; change "
            "one of them.",
        ),
        (
            {"gradient_accumulation_steps": 8},
            "ppo.batch_size / ppo.num_mini_batches = 4 is not divisible by "
            "ppo.gradient_accumulation_steps = 8; change one of them.",
        ),
        (
            {"gradient_accumulation_steps": 2, "ptx_batch_size": 6},
            "ppo.ptx_batch_size / ppo.num_mini_batches = 3 is not divisible by "
            "ppo.gradient_accumulation_steps = 2; change one of them.",
        ),
        (
            {"gradient_accumulation_steps": 0},
            "ppo.gradient_accumulation_steps must be above 0, but is 0.",
        ),
        (
            {"score_batch_size": 3},
            "ppo.batch_size = 8 is not divisible by ppo.score_batch_size = 3; change one of them.",
        ),
        ({"score_batch_size": 0}, "ppo.score_batch_size must be above 0, but is 0."),
    ],
)
def test_settings_that_do_not_divide_are_refused(values, message):
    with pytest.raises(InputError) as error:
        ppo.Settings(**{"batch_size": 8, "num_mini_batches": 2, **values})
    assert str(error.value) == message
