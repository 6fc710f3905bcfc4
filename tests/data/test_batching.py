"""Batches: a pure function of (seed, step), the same on every number of hosts."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.batches import PairBatch, PromptBatch, TextBatch
from rlhf_jax.data import Batches, eval_batches
from rlhf_jax.errors import InputError


def left(lengths, width):
    return np.arange(width)[None] >= width - np.asarray(lengths)[:, None]


def right(lengths, width):
    return np.arange(width)[None] < np.asarray(lengths)[:, None]


def prompts(count, width=8, lengths=None):
    mask = left(lengths if lengths is not None else [width] * count, width)
    return PromptBatch(np.where(mask, 7, 0), mask, np.arange(count, dtype=np.int32))


def texts(lengths, width):
    mask = right(lengths, width)
    return TextBatch(np.where(mask, 7, 0), mask.astype(np.int32), mask & (np.arange(width) > 0))


def pairs(prompt_lengths, chosen, rejected, widths):
    masks = left(prompt_lengths, widths[0]), right(chosen, widths[1]), right(rejected, widths[1])
    arrays = [array for mask in masks for array in (np.where(mask, 7, 0), mask)]
    count = len(chosen)
    return PairBatch(*arrays, margin=np.ones(count, np.float32), valid=np.ones(count, bool))


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def _across(batches):
    """The first array of each batch, then the second one of each, and so on."""
    return zip(*(jax.tree.leaves(batch) for batch in batches), strict=True)


def test_buckets_trim_the_target_positions_too():
    """In a short batch both are narrow; the trimmed positions are those of the same tokens."""
    batch = texts([9, 10, 40, 33], 48)
    targets = [[8], [5, 6, 7, 9], [*range(10, 30)], [*range(20, 33)]]
    positions, mask = np.zeros((4, 24), np.int32), np.zeros((4, 48), bool)
    for row, places in enumerate(targets):
        positions[row, : len(places)], mask[row, places] = places, True
    batches = Batches(
        batch._replace(loss_mask=mask, target_positions=positions), 2, 0, False, buckets=3
    )
    short, long = batches.at(0), batches.at(1)
    assert (short.tokens.shape, short.target_positions.shape) == ((2, 16), (2, 8))
    assert (long.tokens.shape, long.target_positions.shape) == ((2, 48), (2, 24))
    for trimmed, expected in ((short, targets[:2]), (long, targets[2:])):
        for row, places in enumerate(expected):
            kept = trimmed.target_positions[row]
            assert kept[kept > 0].tolist() == places
            assert np.nonzero(trimmed.loss_mask[row])[0].tolist() == places


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5), st.integers(0, 50))
def test_every_epoch_holds_every_example_once(count, size, seed, step):
    batches = Batches(prompts(count), size, seed)
    stream = np.concatenate([batches.at(i).indices for i in range(3 * count // size + 1)])
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    assert_equal(batches.at(step), Batches(prompts(count), size, seed).at(step))


def test_a_resumed_stream_is_the_same_stream():
    there = Batches(prompts(23), 4, seed=1)
    seen = [there.at(step).indices.tolist() for step in range(40)]
    again = Batches(prompts(23), 4, seed=1)
    assert [again.at(step).indices.tolist() for step in reversed(range(40))] == seen[::-1]


def test_epochs_and_seeds_differ():
    one, other = Batches(prompts(50), 50, seed=0), Batches(prompts(50), 50, seed=1)
    assert one.at(0).indices.tolist() != one.at(1).indices.tolist()
    assert one.at(0).indices.tolist() != other.at(0).indices.tolist()
    assert one.at(0).indices.tolist() != list(range(50))


def test_the_arrays_of_an_example_stay_together():
    data = pairs([1, 2, 3], [4, 5, 6], [6, 5, 4], (8, 8))
    batch = Batches(data, 2, seed=0).at(0)
    for row, index in enumerate(Batches(data, 2, seed=0).indices(0)):
        for part, full in zip(jax.tree.leaves(batch), jax.tree.leaves(data), strict=True):
            np.testing.assert_array_equal(part[row], full[index])


def test_without_shuffling_examples_keep_their_order():
    batches = Batches(prompts(5), 3, seed=0, shuffle=False)
    assert [batches.at(i).indices.tolist() for i in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_a_batch_may_be_larger_than_the_data():
    batch = Batches(prompts(3), 8, seed=0).at(0)
    assert np.bincount(batch.indices).sum() == 8
    assert np.bincount(batch.indices).min() >= 2


def test_counts():
    batches = Batches(prompts(10), 4, seed=0)
    assert batches.num_examples == 10
    assert batches.steps_per_epoch == 3


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("buckets", [1, 3])
def test_hosts_feed_parts_of_the_same_batch(hosts, buckets):
    lengths, size = np.random.default_rng(0).integers(1, 48, 20), 8 // hosts
    batches = Batches(texts(lengths, 48), 8, seed=3, buckets=buckets)
    for step in range(6):
        parts = [batches.slice_at(step, n * size, (n + 1) * size) for n in range(hosts)]
        joined = [np.concatenate(arrays) for arrays in _across(parts)]
        assert_equal(joined, batches.at(step))


def test_buckets_trim_padding_only():
    rng = np.random.default_rng(0)
    data = texts(rng.integers(1, 60, 64), 60)
    batches = Batches(data, 2, seed=0, buckets=4)
    full = Batches(data, 2, seed=0)
    widths = set()
    for step in range(32):
        trimmed, untrimmed = batches.at(step), full.at(step)
        width = trimmed.tokens.shape[1]
        widths.add(width)
        assert_equal(trimmed, [array[:, :width] for array in untrimmed[:3]])
        assert not untrimmed.segments[:, width:].any()
        needed = (untrimmed.segments > 0).sum(1).max()
        assert width == min(w for w in (16, 32, 48, 60) if w >= needed)
    assert widths == {16, 32, 48, 60}


def test_buckets_of_pairs_trim_both_sides_together():
    data = pairs([3, 20], [5, 30], [6, 9], (24, 32))
    short, long = (
        Batches(data, 1, seed=0, shuffle=False, buckets=2).at(0),
        Batches(data, 1, seed=0, shuffle=False, buckets=2).at(1),
    )
    assert short.prompts.shape == short.prompt_mask.shape == (1, 16)
    assert short.prompt_mask.sum() == 3
    assert short.prompt_mask[0, -1]
    assert short.chosen.shape == short.rejected_mask.shape == (1, 16)
    assert (short.chosen_mask.sum(), short.rejected_mask.sum()) == (5, 6)
    assert long.prompts.shape == (1, 24)
    assert long.chosen.shape == (1, 32)


def test_buckets_of_prompts_trim_the_left():
    data = prompts(2, 32, lengths=[4, 30])
    batch = Batches(data, 1, seed=0, shuffle=False, buckets=4).at(0)
    assert batch.prompts.shape == (1, 8)
    assert batch.prompt_mask.tolist() == left([4], 8).tolist()


def test_pairs_without_prompts_have_buckets_too():
    data = pairs([0, 0], [5, 30], [6, 9], (0, 32))
    batch = Batches(data, 1, seed=0, shuffle=False, buckets=4).at(0)
    assert batch.prompts.shape == (1, 0)
    assert batch.chosen.shape == (1, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batches.batch_size must be above 0, but is 0"),
        ({"buckets": 0}, "batches.buckets must be from 1 to 4, but is 0"),
        ({"buckets": 5}, "batches.buckets must be from 1 to 4, but is 5"),
        ({"examples": prompts(0)}, "There are no examples"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        Batches(**{"examples": prompts(4), "batch_size": 2, "seed": 0, **settings})


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        prompts(5, 8, [1, 2, 3, 4, 5]),
        texts([3, 4, 5, 6, 7], 8),
        pairs([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1], (8, 8)),
    ],
)
def test_evaluation_has_every_example_once_and_pads_with_zeros(data):
    batches = list(eval_batches(data, 2))
    assert len(batches) == 3
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
    assert_equal(jax.tree.map(lambda array: array[:5], joined), data)
    for array, original in zip(jax.tree.leaves(joined), jax.tree.leaves(data), strict=True):
        assert array.shape[0] == 6
        assert array.dtype == original.dtype
        assert not array[5:].any()


def test_a_slice_of_a_batch_has_the_widths_of_the_full_batch():
    batches = Batches(texts([3, 30, 9, 5], 32), 4, seed=1, buckets=4)
    full = batches.at(5)
    for part in (slice(0, 1), slice(1, 4), slice(2, 2)):
        selected = batches.slice_at(5, part.start, part.stop)
        assert_equal(selected, [array[part] for array in full[:3]])
