"""Supervised fine-tuning: the loss by loops, packing, sums over batches."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import TextBatch
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.training import sft
from tests.models.gpt2_by_loop import log_softmax, logits_by_loop

SETTINGS = sft.Settings(batch_size=3, dropout=False)
SGD = optax.sgd(0.1)
KEY = jax.random.key(0)

# (text, how many of its last tokens are its completion)
TEXTS = [([1, 5, 2, 9, 10], 3), ([4, 10], 1), ([7, 7, 3, 0, 2, 8], 5), ([3, 1, 10], 2)]


def batch_of(examples, width, completions_only=True):
    """A TextBatch of packed texts; junk and no loss on padding."""
    tokens, segments = (
        np.full((len(examples), width), 6),
        np.zeros((len(examples), width), np.int32),
    )
    loss_mask = np.zeros((len(examples), width), bool)
    for row, texts in enumerate(examples):
        start = 0
        for number, (text, completion) in enumerate(texts, start=1):
            end = start + len(text)
            tokens[row, start:end], segments[row, start:end] = text, number
            loss_mask[row, end - completion if completions_only else start + 1 : end] = True
            start = end
    return TextBatch(*(jnp.asarray(x) for x in (tokens, segments, loss_mask)))


def loss_by_loop(params, config, texts, completions_only=True, smoothing=0.0, z_loss=0.0):
    """(loss, accuracy, count): means over the tokens that are to be predicted."""
    losses, hits = [], []
    for text, completion in texts:
        logits = logits_by_loop(params, config, text)
        logprobs = log_softmax(logits)
        for t in range(len(text) - completion if completions_only else 1, len(text)):
            before = logprobs[t - 1]
            normalizer = np.log(np.exp(logits[t - 1]).sum())
            nll = (1 - smoothing) * -before[text[t]] + smoothing * -before.mean()
            losses.append(nll + z_loss * normalizer**2)
            hits.append(before.argmax() == text[t])
    return np.mean(losses), np.mean(hits), len(losses)


@pytest.fixture(scope="module")
def step(model):
    return jax.jit(sft.make_step(model, SETTINGS, optimizer=SGD))


@pytest.fixture(scope="module")
def state(model, params):
    return sft.init_state(model, params, SETTINGS, KEY, optimizer=SGD)


@pytest.fixture(scope="module")
def alone():
    return batch_of([[text] for text in TEXTS], 8)


@pytest.fixture(scope="module")
def packed():
    return batch_of([[TEXTS[0], TEXTS[1]], [TEXTS[2]], [], [TEXTS[3]]], 8)


def assert_trees_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("completions_only", [True, False])
def test_the_loss_is_that_of_a_loop(completions_only, model, params, step, state):
    batch = batch_of([[text] for text in TEXTS], 8, completions_only)
    _, metrics = step(state, batch, KEY)
    loss, accuracy, _ = loss_by_loop(params, model.config, TEXTS, completions_only)
    assert float(metrics["train/loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(metrics["train/accuracy"]) == pytest.approx(accuracy)
    assert float(metrics["perf/tokens"]) == 16
    assert {(x.shape, x.dtype) for x in metrics.values()} == {((), jnp.dtype("float32"))}


def test_smoothing_and_z_loss_reach_the_loss(model, params, state, alone):
    settings = sft.Settings(dropout=False, label_smoothing=0.2, z_loss=0.1)
    step = jax.jit(sft.make_step(model, settings, optimizer=SGD))
    loss, _, _ = loss_by_loop(params, model.config, TEXTS, smoothing=0.2, z_loss=0.1)
    assert float(step(state, alone, KEY)[1]["train/loss"]) == pytest.approx(loss, rel=1e-4)


def test_the_step_follows_the_gradient_of_the_loop(model, params, step, state, alone):
    after, metrics = step(state, alone, KEY)
    assert int(after.step) == 1
    gradient = jax.tree.map(
        lambda old, new: (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / 0.1,
        state.params,
        after.params,
    )
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))
    assert float(metrics["train/grad_norm"]) == pytest.approx(square**0.5, rel=1e-3)
    # Along its own direction the loss, by loops in float64, rises by the gradient's square.
    sides = []
    for epsilon in (1e-4, -1e-4):
        moved = jax.tree.map(
            lambda p, g, e=epsilon: np.asarray(p, np.float64) + e * g, state.params, gradient
        )
        sides.append(loss_by_loop(moved, model.config, TEXTS)[0])
    assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(square, rel=1e-2)


def test_packed_texts_train_like_texts_alone(step, state, alone, packed):
    after, metrics = step(state, alone, KEY)
    packed_after, packed_metrics = step(state, packed, KEY)
    assert_trees_close(packed_metrics, metrics)
    assert_trees_close(packed_after.params, after.params)


def test_logits_of_target_tokens_alone_give_the_same_step(model, step, state, packed):
    """Their places in each example, with room to spare, in place of all."""
    places = np.zeros((packed.tokens.shape[0], 10), np.int32)
    for row, mask in enumerate(np.asarray(packed.loss_mask)):
        places[row, : mask.sum()] = np.nonzero(mask)[0]
    another = jax.jit(sft.make_step(model, SETTINGS, optimizer=SGD))
    actual = another(state, packed._replace(target_positions=jnp.asarray(places)), KEY)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        actual,
        step(state, packed, KEY),
    )


def test_padding_is_never_read(step, state, alone):
    expected = step(state, alone, KEY)
    poisoned = alone._replace(tokens=jnp.where(alone.segments > 0, alone.tokens, 2**30))
    jax.tree.map(np.testing.assert_array_equal, step(state, poisoned, KEY), expected)


def test_the_loss_falls_and_a_donated_state_is_used_without_a_warning(model, params, alone):
    optimizer = optax.adam(0.01)
    fresh = jax.tree.map(jnp.copy, params)
    state = sft.init_state(model, fresh, SETTINGS, KEY, optimizer=optimizer)
    step = jax.jit(sft.make_step(model, SETTINGS, optimizer=optimizer), donate_argnums=0)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of a donated buffer that it cannot use
        for _ in range(30):
            before, (state, metrics) = state, step(state, alone, KEY)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
            losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 30
    assert step._cache_size() == 1


def test_dropout_needs_the_setting_and_follows_the_key(model, step, state, alone):
    settings = dataclasses.replace(SETTINGS, dropout=True)
    dropping = jax.jit(sft.make_step(model, settings, optimizer=SGD))
    losses = [
        float(run(state, alone, jax.random.key(seed))[1]["train/loss"])
        for run, seed in ((dropping, 0), (dropping, 0), (dropping, 1), (step, 0), (step, 1))
    ]
    assert losses[0] == losses[1]
    assert losses[3] == losses[4]
    assert len({losses[0], losses[2], losses[3]}) == 3


def test_sums_of_an_evaluation_do_not_depend_on_the_batches(model, params, alone):
    evaluate = jax.jit(sft.make_eval_step(model))
    expected = loss_by_loop(params, model.config, TEXTS)
    for size in (3, 4):
        sums = dict.fromkeys(("loss", "accuracy", "count"), 0.0)
        for start in range(0, 4, size):
            part = jax.tree.map(lambda x, s=start, n=size: x[s : s + n], alone)
            if part.tokens.shape[0] < size:  # a short last batch is filled up with empty examples
                part = jax.tree.map(
                    lambda x, n=size: jnp.pad(x, ((0, n - x.shape[0]), (0, 0))), part
                )
            sums = {name: sums[name] + float(x) for name, x in evaluate(params, part).items()}
        assert sums["count"] == expected[2]
        assert sums["loss"] / sums["count"] == pytest.approx(expected[0], rel=1e-4)
        assert sums["accuracy"] / sums["count"] == pytest.approx(expected[1])


def test_gradients_of_parts_with_the_count_of_the_batch_add_up(model, params, alone):
    count = float(alone.loss_mask.sum())

    def loss(params, batch):
        return sft._loss(model, SETTINGS, None, params, batch, None, count)[0]

    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    complete = loss_and_gradient(params, alone)
    examples = jnp.arange(4)[:, None]
    parts = [alone._replace(loss_mask=alone.loss_mask & (examples == row)) for row in range(4)]
    parts = [loss_and_gradient(params, part) for part in parts]
    assert_trees_close(jax.tree.map(lambda *x: sum(x), *parts), complete)


def test_bfloat16_trains_close_to_float32(model, params, state, alone, step):
    half = jax.jit(sft.make_step(GPT2(model.config, "bfloat16"), SETTINGS, optimizer=SGD))
    after, metrics = half(state, alone, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    expected = float(step(state, alone, KEY)[1]["train/loss"])
    assert float(metrics["train/loss"]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"num_epochs": -1.0}, {"label_smoothing": 1.0}]
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match=f"sft.{next(iter(change))} must be"):
        sft.Settings(**change)
