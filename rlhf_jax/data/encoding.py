"""Shared by the encoders of all kinds: token ids, EOS, padding, widths and counted warnings."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("rlhf_jax.data")

MULTIPLE = 8  # widths are multiples of this, so that similar data sets share compiled programs


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens that the text does not contain itself."""
    if not texts:
        return []
    # `verbose` would warn of every text beyond the model's length; texts are truncated later.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def with_eos(tokens: list[int], eos: int) -> list[int]:
    """The tokens with EOS at the end, appended unless they end with it."""
    return tokens if tokens and tokens[-1] == eos else [*tokens, eos]


def is_empty(tokens: Sequence[int], eos: int) -> bool:
    """Whether there is no token before EOS."""
    return not tokens or (len(tokens) == 1 and tokens[0] == eos)


def width(lengths: Sequence[int], max_width: int) -> int:
    """The longest length rounded up to a multiple of 8, but at most `max_width`.

    >>> width([3, 17], 128), width([3, 17], 20), width([0], 20)
    (24, 20, 0)
    """
    longest = max(lengths, default=0)
    return min(max_width, -(-longest // MULTIPLE) * MULTIPLE)


# Arrays are NumPy arrays here, and typed `Any` because batches.py declares arrays of JAX.
def pad_left(sequences: Sequence[Sequence[int]], length: int) -> tuple[Any, Any]:
    """(tokens i32[N, length], mask bool[N, length]) with the padding, token 0, on the left."""
    tokens, mask = pad_right([sequence[::-1] for sequence in sequences], length)
    return np.ascontiguousarray(tokens[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])


def pad_right(sequences: Sequence[Sequence[int]], length: int) -> tuple[Any, Any]:
    """(tokens i32[N, length], mask bool[N, length]) with the padding, token 0, on the right."""
    lengths = np.asarray([len(sequence) for sequence in sequences], np.int64)
    mask = np.arange(length)[None, :] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.fromiter(itertools.chain.from_iterable(sequences), np.int32)
    return tokens, mask


def warn(count: int, total: int, message: str) -> None:
    """Logs one warning, "COUNT of TOTAL MESSAGE", unless the count is 0."""
    if count:
        logger.warning("%d of %d %s", count, total, message)
