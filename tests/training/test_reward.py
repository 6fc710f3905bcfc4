"""The reward model's step: the loss by loops, and examples that only fill up a batch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import PairBatch
from rlhf_jax.errors import InputError
from rlhf_jax.training import reward
from tests.models.gpt2_by_loop import hidden_by_loop

SETTINGS = reward.Settings(batch_size=4, center_coef=0.1)
SGD = optax.sgd(0.1)
KEY = jax.random.key(0)

# (prompt, chosen, rejected, margin)
PAIRS = [
    ([1, 5], [2, 9, 10], [3, 10], 0.0),
    ([4], [10], [7, 7, 2, 10], 0.5),
    ([7, 3, 0], [8, 1], [8, 2], 0.0),
    ([2, 2, 2], [6, 10], [5, 5, 10], 1.5),
]


def batch_of(pairs, examples, prompt_width=4, width=5):
    """A PairBatch with junk on the padding and, past the pairs, in examples that are none."""
    shapes = {"prompts": prompt_width, "chosen": width, "rejected": width}
    tokens = {name: np.full((examples, n), 6, np.int32) for name, n in shapes.items()}
    masks = {name: np.zeros((examples, n), bool) for name, n in shapes.items()}
    margin = np.full(examples, np.nan, np.float32)
    for row, (prompt, chosen, rejected, wanted) in enumerate(pairs):
        tokens["prompts"][row, prompt_width - len(prompt) :] = prompt
        masks["prompts"][row, prompt_width - len(prompt) :] = True
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            tokens[name][row, : len(text)], masks[name][row, : len(text)] = text, True
        margin[row] = wanted
    columns = [x for name in shapes for x in (tokens[name], masks[name])]
    return PairBatch(
        *(jnp.asarray(x) for x in (*columns, margin, np.arange(examples) < len(pairs)))
    )


def loss_by_loop(params, config, pairs, center_coef):
    """(loss, accuracy, margin), means over pairs."""
    kernel = np.asarray(params["head"]["kernel"], np.float64)
    losses, hits, margins = [], [], []
    for prompt, chosen, rejected, margin in pairs:
        a, b = (
            hidden_by_loop(params["model"], config, prompt + text)[-1] @ kernel
            for text in (chosen, rejected)
        )
        losses.append(np.log1p(np.exp(-(a - b - margin))) + center_coef * (a + b) ** 2)
        hits.append(a > b)
        margins.append(a - b)
    return np.mean(losses), np.mean(hits), np.mean(margins)


@pytest.fixture(scope="module")
def step(reward_model):
    return jax.jit(reward.make_step(reward_model, SETTINGS, optimizer=SGD))


@pytest.fixture(scope="module")
def state(reward_model, reward_params):
    return reward.init_state(reward_model, reward_params, SETTINGS, KEY, optimizer=SGD)


def test_the_loss_is_that_of_a_loop(reward_model, reward_params, step, state):
    _, metrics = step(state, batch_of(PAIRS, 4), KEY)
    expected = loss_by_loop(reward_params, reward_model.config, PAIRS, 0.1)
    for name, value in zip(("loss", "accuracy", "margin"), expected, strict=True):
        assert float(metrics[f"train/{name}"]) == pytest.approx(value, rel=1e-3, abs=1e-4)
    tokens = sum(len(text) for pair in PAIRS for text in pair[:3])
    assert float(metrics["perf/tokens"]) == tokens
    assert {(x.shape, x.dtype) for x in metrics.values()} == {((), jnp.dtype("float32"))}


def test_the_step_follows_the_gradient_of_the_loop(reward_model, step, state):
    after, metrics = step(state, batch_of(PAIRS, 4), KEY)
    gradient = jax.tree.map(
        lambda old, new: (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / 0.1,
        state.params,
        after.params,
    )
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))
    assert float(metrics["train/grad_norm"]) == pytest.approx(square**0.5, rel=1e-3)
    sides = []
    for epsilon in (1e-4, -1e-4):
        moved = jax.tree.map(
            lambda p, g, e=epsilon: np.asarray(p, np.float64) + e * g, state.params, gradient
        )
        sides.append(loss_by_loop(moved, reward_model.config, PAIRS, 0.1)[0])
    assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(square, rel=1e-2)


def test_examples_that_fill_up_a_batch_change_nothing(step, state):
    expected = step(state, batch_of(PAIRS[:3], 3), KEY)
    filled = batch_of(PAIRS[:3], 4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        step(state, filled, KEY),
        expected,
    )


def test_padding_is_never_read(step, state):
    batch = batch_of(PAIRS, 4)
    poisoned = batch._replace(
        prompts=jnp.where(batch.prompt_mask, batch.prompts, 2**30),
        chosen=jnp.where(batch.chosen_mask, batch.chosen, -1),
        rejected=jnp.where(batch.rejected_mask, batch.rejected, 3),
    )
    jax.tree.map(np.testing.assert_array_equal, step(state, poisoned, KEY), step(state, batch, KEY))


def test_training_tells_the_pairs_apart(reward_model, reward_params):
    optimizer = optax.adam(0.02)
    fresh = jax.tree.map(jnp.copy, reward_params["model"])
    state = reward.init_state(reward_model, fresh, SETTINGS, KEY, optimizer=optimizer)
    assert set(state.params) == {"model", "head"}
    assert float(jnp.abs(state.params["head"]["kernel"]).max()) > 0
    step = jax.jit(reward.make_step(reward_model, SETTINGS, optimizer=optimizer), donate_argnums=0)
    batch = batch_of(PAIRS, 4)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of a donated buffer that it cannot use
        for _ in range(40):
            state, metrics = step(state, batch, KEY)
            losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert float(metrics["train/accuracy"]) == 1.0
    assert step._cache_size() == 1


def test_a_fresh_head_follows_the_key(reward_model, reward_params):
    heads = [
        reward.init_state(reward_model, reward_params["model"], SETTINGS, jax.random.key(seed))
        .params["head"]["kernel"]
        .tolist()
        for seed in (0, 0, 1)
    ]
    assert heads[0] == heads[1] != heads[2]


def test_sums_of_an_evaluation_do_not_depend_on_the_batches(reward_model, reward_params):
    evaluate = jax.jit(reward.make_eval_step(reward_model))
    expected = loss_by_loop(reward_params, reward_model.config, PAIRS, 0.0)
    for size in (3, 4):
        sums = dict.fromkeys(("loss", "accuracy", "margin", "count"), 0.0)
        for start in range(0, 4, size):
            part = evaluate(reward_params, batch_of(PAIRS[start : start + size], size))
            sums = {name: sums[name] + float(value) for name, value in part.items()}
        assert sums["count"] == 4
        for name, value in zip(("loss", "accuracy", "margin"), expected, strict=True):
            assert sums[name] / 4 == pytest.approx(value, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"num_epochs": 0.0}, {"center_coef": -0.1}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match=f"reward.{next(iter(change))} must"):
        reward.Settings(**change)
