"""Dropout: rates, exact expectations, independence, and parts of an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.dropout import drop, kept, start_dropout


def mask(seed, shape, rate, first_row=0):
    return np.asarray(kept(start_dropout(jax.random.key(seed), rate), shape, first_row))


def by_loop(words, shape, rate):
    """The hashes of [A, B, rows, columns] one by one, in Python's integers."""

    def hashed(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    out = np.zeros(shape, bool)
    for a, b, row, column in np.ndindex(*shape):
        first = hashed((a * shape[1] + b) ^ words[0])
        second = hashed((first + words[1]) % 2**32)
        word = hashed((hashed(((row << 16) ^ column) ^ first) + second) % 2**32)
        out[a, b, row, column] = word >= round(rate * 2**32)
    return out


def test_equals_a_loop():
    words = [int(word) for word in start_dropout(jax.random.key(3), 0.4).words]
    np.testing.assert_array_equal(mask(3, (2, 3, 4, 5), 0.4), by_loop(words, (2, 3, 4, 5), 0.4))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(64, 1001), (20, 4, 80, 80)])
def test_the_rate_is_kept_and_the_factor_makes_up_for_it(rate, shape):
    keep = mask(0, shape, rate)
    assert keep.shape == shape
    assert keep.dtype == bool
    deviation = np.sqrt(rate * (1 - rate) / np.prod(shape))
    assert abs(np.mean(keep) - (1 - rate)) < 4 * deviation
    assert start_dropout(jax.random.key(0), rate).scale == pytest.approx(1 / (1 - rate), rel=1e-6)


def shifted(shape, axis, distance):
    stops = [slice(None)] * len(shape)
    starts = list(stops)
    stops[axis], starts[axis] = slice(None, -distance), slice(distance, None)
    return tuple(stops), tuple(starts)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("distance", [1, 2, 8])
def test_neighbours_are_independent(axis, distance):
    shape = (16, 12, 32, 64)
    keep = mask(1, shape, 0.3).astype(float)
    one, other = (keep[at].ravel() for at in shifted(shape, axis, distance))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(one.size)


def test_keys_are_independent_however_their_entries_are_paired():
    one, other = (mask(seed, (256, 256), 0.3).astype(float) for seed in (1, 2))
    # All shifts of both axes at once, as circular correlations.
    spectra = [np.fft.fft2(x - x.mean()) for x in (one, other)]
    correlation = np.fft.ifft2(spectra[0] * spectra[1].conj()).real / (
        one.size * one.std() * other.std()
    )
    # The largest of 65,536 normal deviates of 1 / 256.
    assert np.abs(correlation).max() < 5.5 / 256
    # And all pairings by "exclusive or", as a Walsh-Hadamard transform.
    spectra = [walsh((x - x.mean()).ravel()) for x in (one, other)]
    correlation = walsh(spectra[0] * spectra[1]) / one.size / (one.size * one.std() * other.std())
    assert np.abs(correlation).max() < 5.5 / 256


def walsh(x):
    """The Walsh-Hadamard transform of 2^n numbers."""
    size = 1
    while size < x.size:
        pairs = x.reshape(-1, 2, size)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).ravel()
        size *= 2
    return x


def test_another_key_is_another_mask_and_the_same_the_same():
    one, same, other = (mask(seed, (8, 9), 0.5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_a_part_drops_as_the_full_array():
    full = mask(4, (3, 2, 10, 12), 0.5)
    np.testing.assert_array_equal(mask(4, (3, 2, 4, 7), 0.5, 6), full[..., 6:, :7])


def test_kept_entries_are_scaled_in_the_dtype_of_the_array():
    x = jnp.full((2, 4, 8), 3.0, jnp.bfloat16)
    dropped = drop(start_dropout(jax.random.key(0), 0.5), x)
    assert dropped.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dropped, np.where(mask(0, x.shape, 0.5), 6.0, 0.0))
