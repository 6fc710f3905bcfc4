"""PPO-ptx: the term by loops, and what padding and the other settings do to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import TextBatch
from rlhf_jax.errors import InputError
from rlhf_jax.training import ppo
from tests.models.gpt2_by_loop import log_softmax, logits_by_loop
from tests.training.ppo_by_loop import EOS, KEY, RATE, SCORES, SETTINGS, update_with

COEF = 0.7
MIXED = dataclasses.replace(SETTINGS, ptx_coef=COEF, ptx_batch_size=2)

# Sequences of texts: (tokens, first target position). The first sequence is packed.
ROWS = [[([3, 1, 4, 1, 5], 1), ([9, 2, 6], 2)], [([5, 3, 5], 1)]]


def text_batch(examples, width=9, junk=6):
    """A TextBatch with junk on the padding."""
    shape = (len(examples), width)
    tokens, segments = np.full(shape, junk, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    for row, texts in enumerate(examples):
        start = 0
        for number, (text, target_start) in enumerate(texts, 1):
            end = start + len(text)
            tokens[row, start:end], segments[row, start:end] = text, number
            loss_mask[row, start + target_start : end] = True
            start = end
    return TextBatch(*map(jnp.asarray, (tokens, segments, loss_mask)))


def nll_by_loop(params, config, examples):
    """Mean over the targets of all texts, each in a pass of its own."""
    losses = []
    for text, target_start in (text for row in examples for text in row):
        complete = log_softmax(logits_by_loop(params, config, text[:-1]))
        losses += [-complete[t - 1, text[t]] for t in range(target_start, len(text))]
    return np.mean(losses)


@pytest.fixture(scope="module")
def update(model):
    return update_with(model, MIXED)


@pytest.fixture(scope="module")
def mixed(update, state, batch, rollout):
    """(state, metrics, scored) of one update with the texts."""
    return update(state, batch._replace(texts=text_batch(ROWS)), rollout, SCORES, KEY)


@pytest.fixture(scope="module")
def plain_update(model):
    return update_with(model, SETTINGS)


@pytest.fixture(scope="module")
def plain(plain_update, state, batch, rollout):
    """The same update without the coefficient."""
    texts = text_batch(ROWS)
    return plain_update(state, batch._replace(texts=texts), rollout, SCORES, KEY)


@pytest.mark.newest
def test_the_update_has_the_gradient_of_the_texts_besides(mixed, plain, model, state):
    """Its difference from PPO's own, which has its tests, against the slope of the loop."""
    policy = state.params["model"]
    assert float(mixed[1]["loss/ptx_avg"]) == pytest.approx(
        nll_by_loop(policy, model.config, ROWS), rel=1e-4
    )
    added = jax.tree.map(
        lambda more, less: (np.asarray(less, np.float64) - np.asarray(more, np.float64)) / RATE,
        mixed[0].params,
        plain[0].params,
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(added["value_head"]))
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(added["model"]))
    sides = []
    for epsilon in (1e-4, -1e-4):
        moved = jax.tree.map(
            lambda p, g, e=epsilon: np.asarray(p, np.float64) + e * g, policy, added["model"]
        )
        sides.append(COEF * nll_by_loop(moved, model.config, ROWS))
    assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(square, rel=1e-2)
    assert set(mixed[1]) - set(plain[1]) == {"loss/ptx_avg"}
    for name in set(plain[1]) - {"train/grad_norm"}:
        np.testing.assert_array_equal(mixed[1][name], plain[1][name], err_msg=name)


def test_padding_of_texts_is_never_read(update, mixed, state, batch, rollout):
    texts = text_batch(ROWS, junk=2**30)
    poisoned = update(state, batch._replace(texts=texts), rollout, SCORES, KEY)
    jax.tree.map(np.testing.assert_array_equal, poisoned[:2], mixed[:2])


def test_without_the_coefficient_texts_are_no_part_of_the_program(
    plain_update, state, batch, rollout
):
    with_texts, without = (
        plain_update.lower(state, batch._replace(texts=texts), rollout, SCORES, KEY).as_text()
        for texts in (text_batch(ROWS), None)
    )
    assert with_texts == without


def test_texts_without_a_token_to_learn_change_nothing(update, plain, state, batch, rollout):
    texts = text_batch(ROWS)
    empty = texts._replace(loss_mask=jnp.zeros_like(texts.loss_mask))
    after, metrics, _ = update(state, batch._replace(texts=empty), rollout, SCORES, KEY)
    assert float(metrics["loss/ptx_avg"]) == 0.0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        after.params,
        plain[0].params,
    )


def test_each_epoch_splits_the_texts_anew():
    settings = dataclasses.replace(MIXED, num_ppo_epochs=3, num_mini_batches=4, ptx_batch_size=8)
    numbers = jnp.arange(8)[:, None]
    texts = TextBatch(numbers, numbers, numbers > 0)
    parts = ppo._text_minibatches(settings, texts, KEY)
    assert parts.tokens.shape == (12, 2, 1)
    np.testing.assert_array_equal(parts.tokens, parts.segments)
    epochs = np.asarray(parts.tokens).reshape(3, 8)
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    other = ppo._text_minibatches(settings, texts, jax.random.key(8)).tokens
    assert (np.asarray(other) != np.asarray(parts.tokens)).any()
    # Not the order of the responses, whose keys are split off the same one.
    keys = jax.random.split(KEY, 3)
    responses = [jax.random.permutation(key, 8).tolist() for key in keys]
    assert all(epoch not in responses for epoch in epochs.tolist())


def test_missing_or_miscounted_texts_are_refused_while_tracing(model, state, batch, rollout):
    step = ppo.make_update_step(model, MIXED, stop_token_ids=(EOS,))
    for texts, message in (
        (None, r"ppo.ptx_coef is 0.7, but the batch has no texts: put a TextBatch into"),
        (text_batch([ROWS[0]] * 3), "has 3 sequences of texts, but ppo.ptx_batch_size is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(step, state, batch._replace(texts=texts), rollout, SCORES, KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ptx_coef": -1.0}, "ppo.ptx_coef must not be negative, but is -1.0"),
        ({"ptx_coef": float("inf")}, "ppo.ptx_coef must be a finite number"),
        ({"ptx_batch_size": 0}, "ppo.ptx_batch_size must be above 0, but is 0"),
        ({"ptx_batch_size": 6}, "ptx_batch_size = 6 is not divisible by ppo.num_mini_batches = 4"),
    ],
    ids=str,
)
def test_settings_out_of_range_say_what_is_allowed(change, message):
    with pytest.raises(InputError, match=message):
        ppo.Settings(**change)
    assert ppo.Settings(batch_size=8).num_texts == 8
