"""Preference pairs: one prompt and two responses, tokenized apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.batches import PairBatch
from rlhf_jax.data.datasets import Settings
from rlhf_jax.data.encoding import encode, is_empty, pad_left, pad_right, warn, width, with_eos
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class _Pair(NamedTuple):
    """Token ids of one pair, before anything is cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float


def pair_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> PairBatch:
    """All pairs as one batch of NumPy arrays.

    The response is tokenized apart from its prompt (prompt ids + response ids), as it is when a
    policy writes it, and EOS is appended once. Prompts keep their last `max_prompt_length` tokens;
    responses their first `max_response_length`, and those that lose their right end lose their EOS
    with it. Rows with an empty response, or two that are equal (after cutting, too), are dropped.
    Each of these is logged in one counted warning.

    Args:
      rows: "pairs" rows of `load_rows`: `chosen`, `rejected`, and perhaps `prompt`, `margin`.
      tokenizer: makes the tokens.
      settings: the limits.

    Returns:
      A batch with P and T the longest prompt and response rounded up to a multiple of 8, at most
      their limits; P is 0 if there is no prompt anywhere. Token 0 and False on padding; `rows` is
      True throughout.

    Raises:
      InputError: if no pair is left.
    """
    found = _tokenize(rows, tokenizer)
    most = settings.max_response_length
    kept, equal, empty = [], 0, 0
    for pair in found:
        if any(is_empty(r, tokenizer.eos_token_id) for r in (pair.chosen, pair.rejected)):
            empty += 1
        elif pair.chosen[:most] == pair.rejected[:most]:
            equal += 1
        else:
            kept.append(pair)
    _warn(kept, empty, equal, len(rows), settings)
    if not kept:
        raise InputError(
            f"No pair is left: of {len(rows)}, {empty} have an empty response and {equal} have two "
            f"that are equal within data.max_response_length ({most} tokens)."
        )
    return _arrays(kept, settings)


def _tokenize(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[_Pair]:
    eos = tokenizer.eos_token_id
    prompts = encode(tokenizer, [row.get("prompt", "") for row in rows])
    chosen = encode(tokenizer, [row["chosen"] for row in rows])
    rejected = encode(tokenizer, [row["rejected"] for row in rows])
    return [
        _Pair(prompt, with_eos(better, eos), with_eos(worse, eos), row.get("margin", 0.0))
        for row, prompt, better, worse in zip(rows, prompts, chosen, rejected, strict=True)
    ]


def _warn(kept: Sequence[_Pair], empty: int, equal: int, total: int, settings: Settings) -> None:
    most_prompt, most = settings.max_prompt_length, settings.max_response_length
    warn(empty, total, "pairs were dropped because a response is empty.")
    warn(equal, total, "pairs were dropped because their two responses are equal.")
    warn(
        sum(len(pair.prompt) > most_prompt for pair in kept),
        len(kept),
        f"prompts lost their left end: they exceed data.max_prompt_length ({most_prompt} tokens).",
    )
    warn(
        sum(len(response) > most for pair in kept for response in (pair.chosen, pair.rejected)),
        2 * len(kept),
        f"responses lost their right end: they exceed data.max_response_length ({most} tokens).",
    )


def _arrays(pairs: Sequence[_Pair], settings: Settings) -> PairBatch:
    most_prompt, most = settings.max_prompt_length, settings.max_response_length
    prompts = [pair.prompt[-most_prompt:] for pair in pairs]
    chosen = [pair.chosen[:most] for pair in pairs]
    rejected = [pair.rejected[:most] for pair in pairs]
    longest = width([len(response) for response in chosen + rejected], most)
    margin: Any = np.asarray([pair.margin for pair in pairs], np.float32)
    real: Any = np.ones(len(pairs), bool)
    return PairBatch(
        *pad_left(prompts, width([len(prompt) for prompt in prompts], most_prompt)),
        *pad_right(chosen, longest),
        *pad_right(rejected, longest),
        margin=margin,
        rows=real,
    )
