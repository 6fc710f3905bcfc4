"""What the kinds of sequences share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.encoding import is_empty, pad_left, pad_right, width, with_eos

SEQUENCES = st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5)


@given(SEQUENCES)
def test_padding_keeps_every_token_on_its_side(sequences):
    for pad, columns in ((pad_left, slice(None, None, -1)), (pad_right, slice(None))):
        tokens, mask = pad(sequences, 7)
        assert tokens.shape == mask.shape == (len(sequences), 7)
        assert (tokens.dtype, mask.dtype) == (np.int32, bool)
        assert [t[m].tolist() for t, m in zip(tokens, mask, strict=True)] == sequences
        assert (np.diff(mask[:, columns].astype(int), axis=1) <= 0).all()
        assert not tokens[~mask].any()


@pytest.mark.parametrize(("tokens", "expected"), [([], [5]), ([1], [1, 5]), ([1, 5], [1, 5])])
def test_eos_is_appended_once(tokens, expected):
    assert with_eos(tokens, 5) == expected


def test_empty_means_nothing_before_eos():
    assert [is_empty(tokens, 5) for tokens in ([], [5], [1], [5, 5])] == [True, True, False, False]


@given(st.lists(st.integers(0, 100), max_size=5), st.integers(1, 100))
def test_width(lengths, most):
    result = width(lengths, most)
    assert result <= most
    assert result == most or result % 8 == 0
    assert result == most or 0 <= result - max(lengths, default=0) < 8
