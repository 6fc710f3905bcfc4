"""Batches: a pure function of (seed, step), the same rows on every number of hosts."""

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


def prompts(rows, width=8, lengths=None):
    mask = left(lengths if lengths is not None else [width] * rows, width)
    return PromptBatch(np.where(mask, 7, 0), mask, np.arange(rows, dtype=np.int32))


def texts(lengths, width):
    mask = right(lengths, width)
    return TextBatch(np.where(mask, 7, 0), mask.astype(np.int32), mask & (np.arange(width) > 0))


def pairs(prompt_lengths, chosen, rejected, widths):
    masks = left(prompt_lengths, widths[0]), right(chosen, widths[1]), right(rejected, widths[1])
    arrays = [array for mask in masks for array in (np.where(mask, 7, 0), mask)]
    rows = len(chosen)
    return PairBatch(*arrays, margin=np.ones(rows, np.float32), valid=np.ones(rows, bool))


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def _across(batches):
    """The first array of each batch, then the second one of each, and so on."""
    return zip(*(jax.tree.leaves(batch) for batch in batches), strict=True)


def test_buckets_cut_the_learned_places_too():
    """In a short batch both are narrow; what is left names the same tokens."""
    batch = texts([9, 10, 40, 33], 48)
    places = [[8], [5, 6, 7, 9], [*range(10, 30)], [*range(20, 33)]]
    learned, mask = np.zeros((4, 24), np.int32), np.zeros((4, 48), bool)
    for row, found in enumerate(places):
        learned[row, : len(found)], mask[row, found] = found, True
    batches = Batches(
        batch._replace(loss_mask=mask, target_positions=learned), 2, 0, False, buckets=3
    )
    short, long = batches.at(0), batches.at(1)
    assert (short.tokens.shape, short.target_positions.shape) == ((2, 16), (2, 8))
    assert (long.tokens.shape, long.target_positions.shape) == ((2, 48), (2, 24))
    for cut, rows in ((short, places[:2]), (long, places[2:])):
        for row, found in enumerate(rows):
            assert cut.target_positions[row][cut.target_positions[row] > 0].tolist() == found
            assert np.nonzero(cut.loss_mask[row])[0].tolist() == found


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5), st.integers(0, 50))
def test_every_epoch_holds_every_row_once(rows, size, seed, step):
    batches = Batches(prompts(rows), size, seed)
    stream = np.concatenate([batches.at(i).indices for i in range(3 * rows // size + 1)])
    for epoch in range(len(stream) // rows):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))
    assert_equal(batches.at(step), Batches(prompts(rows), size, seed).at(step))


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


def test_rows_keep_their_parts_together():
    data = pairs([1, 2, 3], [4, 5, 6], [6, 5, 4], (8, 8))
    batch = Batches(data, 2, seed=0).at(0)
    for row, index in enumerate(Batches(data, 2, seed=0).indices(0)):
        for part, whole in zip(batch, data, strict=True):
            np.testing.assert_array_equal(part[row], whole[index])


def test_without_shuffling_rows_come_in_order():
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
    lengths = np.random.default_rng(0).integers(1, 48, 20)
    batches = Batches(texts(lengths, 48), 8, seed=3, buckets=buckets)
    for step in range(6):
        parts = [batches.at(step, host, hosts) for host in range(hosts)]
        whole = [np.concatenate(arrays) for arrays in _across(parts)]
        assert_equal(whole, batches.at(step))


def test_buckets_cut_padding_only():
    rng = np.random.default_rng(0)
    data = texts(rng.integers(1, 60, 64), 60)
    batches = Batches(data, 2, seed=0, buckets=4)
    full = Batches(data, 2, seed=0)
    widths = set()
    for step in range(32):
        cut, whole = batches.at(step), full.at(step)
        width = cut.tokens.shape[1]
        widths.add(width)
        assert_equal(cut, [array[:, :width] for array in whole[:3]])
        assert not whole.segments[:, width:].any()
        needed = (whole.segments > 0).sum(1).max()
        assert width == min(w for w in (16, 32, 48, 60) if w >= needed)
    assert widths == {16, 32, 48, 60}


def test_buckets_of_pairs_cut_both_sides_together():
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


def test_buckets_of_prompts_cut_the_left():
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
        ({"batch_size": 0}, "batch size is 0: set it to 1 or more"),
        ({"buckets": 0}, "length buckets is 0: it is 1 to 4"),
        ({"buckets": 5}, "length buckets is 5: it is 1 to 4"),
        ({"rows": prompts(0)}, "There are no rows"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        Batches(**{"rows": prompts(4), "batch_size": 2, "seed": 0, **settings})


def test_hosts_have_to_divide_the_batch():
    with pytest.raises(InputError, match=r"batch size is 6, which 4 hosts .* multiple of 4"):
        Batches(prompts(8), 6, seed=0).at(0, 0, 4)
    with pytest.raises(InputError, match="batch size is 6, which 4 hosts"):
        list(eval_batches(prompts(8), 6, 0, 4))


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        prompts(5, 8, [1, 2, 3, 4, 5]),
        texts([3, 4, 5, 6, 7], 8),
        pairs([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1], (8, 8)),
    ],
)
def test_evaluation_visits_every_row_once_and_fills_with_inert_ones(data):
    batches = list(eval_batches(data, 2))
    assert len(batches) == 3
    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
    assert_equal(jax.tree.map(lambda array: array[:5], whole), data)
    for array, original in zip(jax.tree.leaves(whole), jax.tree.leaves(data), strict=True):
        assert array.shape[0] == 6
        assert array.dtype == original.dtype
        assert not array[5:].any()


def test_evaluation_on_several_hosts():
    data = texts([3, 4, 5, 6, 7], 8)
    parts = [list(eval_batches(data, 4, host, 2)) for host in range(2)]
    whole = list(eval_batches(data, 4))
    for first, second, batch in zip(*parts, whole, strict=True):
        assert_equal([np.concatenate(pair) for pair in _across((first, second))], batch)


def test_rows_of_a_batch_are_those_of_the_whole_in_its_widths():
    batches = Batches(texts([3, 30, 9, 5], 32), 4, seed=1, buckets=4)
    whole = batches.at(5)
    for rows in (slice(0, 1), slice(1, 4), slice(2, 2)):
        part = batches.rows_at(5, rows.start, rows.stop)
        assert_equal(part, [array[rows] for array in whole[:3]])
