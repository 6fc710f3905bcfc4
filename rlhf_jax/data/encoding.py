"""What the three kinds of rows share: token ids, EOS, padding, widths and counted warnings."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("rlhf_jax.data")

MULTIPLE = 8  # widths are multiples of this, so that data sets alike share compiled programs


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens that the text does not name itself."""
    if not texts:
        return []
    # Without `verbose` every text beyond the model's length is complained about; ours are cut.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def with_eos(tokens: list[int], eos: int) -> list[int]:
    """The tokens and EOS, which is not repeated if it stands at the end already."""
    return tokens if tokens and tokens[-1] == eos else [*tokens, eos]


def is_empty(tokens: Sequence[int], eos: int) -> bool:
    """Whether there is nothing before EOS."""
    return not tokens or (len(tokens) == 1 and tokens[0] == eos)


def width(lengths: Sequence[int], most: int) -> int:
    """The longest length rounded up to a multiple of 8, but at most `most`.

    >>> width([3, 17], 128), width([3, 17], 20), width([0], 20)
    (24, 20, 0)
    """
    longest = max(lengths, default=0)
    return min(most, -(-longest // MULTIPLE) * MULTIPLE)


# Arrays are NumPy's here, and typed `Any` since batches.py declares those of JAX.
def pad_left(rows: Sequence[Sequence[int]], columns: int) -> tuple[Any, Any]:
    """(tokens i32[N, columns], mask bool[N, columns]) with the padding, token 0, on the left."""
    tokens, mask = pad_right([row[::-1] for row in rows], columns)
    return np.ascontiguousarray(tokens[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])


def pad_right(rows: Sequence[Sequence[int]], columns: int) -> tuple[Any, Any]:
    """(tokens i32[N, columns], mask bool[N, columns]) with the padding, token 0, on the right."""
    lengths = np.asarray([len(row) for row in rows], np.int64)
    mask = np.arange(columns)[None, :] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    return tokens, mask


def warn(count: int, total: int, what: str) -> None:
    """One line in the log for all rows that something was done to; none if there are none."""
    if count:
        logger.warning("%d of %d %s", count, total, what)
