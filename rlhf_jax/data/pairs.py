"""Preference pairs: one prompt and two responses, tokenized apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.batches import PairBatch
from rlhf_jax.data.chat import response_texts
from rlhf_jax.data.cutting import Prompt, tokenize_prompts, warn_of_cut_prompts
from rlhf_jax.data.datasets import Settings
from rlhf_jax.data.encoding import encode, is_empty, pad_left, pad_right, warn, width, with_eos
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class _Texts(NamedTuple):
    """One pair as texts."""

    prompt: str
    chosen: str
    rejected: str
    margin: float


class _Pair(NamedTuple):
    """Token ids of one pair, before anything is cut."""

    prompt: Prompt
    chosen: list[int]
    rejected: list[int]
    margin: float


def encode_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> PairBatch:
    """All pairs as one batch of NumPy arrays.

    The response is tokenized apart from its prompt (prompt ids + response ids), as it is when a
    policy writes it, and EOS is appended once. Prompts keep their last `max_prompt_length` tokens,
    or the first ones and `prompt_suffix` if they end with that; responses their first
    `max_response_length`, and those that lose their right end lose their EOS with it. Rows with an
    empty response, one of fewer than `min_response_words`, or two that are equal (after cutting,
    too), are dropped, and conversations that differ before their last turn. Each of these is logged
    in one counted warning.

    Args:
      rows: "pairs" rows of `load_examples`: `chosen`, `rejected`, and perhaps `prompt`, `margin`.
      tokenizer: makes the tokens, and the text of messages through its chat template.
      settings: the limits.

    Returns:
      A batch with P and T the longest prompt and response rounded up to a multiple of 8, at most
      their limits; P is 0 if there is no prompt anywhere. Token 0 and False on padding; `rows` is
      True throughout.

    Raises:
      InputError: if no pair is left, or messages cannot be rendered.
    """
    usable, apart, short = _usable(rows, tokenizer, settings.min_response_words)
    found = _tokenize(usable, tokenizer, settings)
    most = settings.max_response_length
    kept, equal, empty = [], 0, 0
    for pair in found:
        if any(is_empty(r, tokenizer.eos_token_id) for r in (pair.chosen, pair.rejected)):
            empty += 1
        elif pair.chosen[:most] == pair.rejected[:most]:
            equal += 1
        else:
            kept.append(pair)
    words = f"a response of fewer than {settings.min_response_words} words"
    warn(apart, len(rows), "pairs were dropped because they differ before their last turn.")
    warn(short, len(rows), f"pairs were dropped because they have {words}.")
    _warn(kept, empty, equal, len(rows), settings)
    if not kept:
        more = f", {short} {words}" * (short > 0) + f", {apart} no prompt in common" * (apart > 0)
        raise InputError(
            f"No pair is left: of {len(rows)}, {empty} have an empty response{more} and {equal} "
            f"have two that are equal within data.max_response_length ({most} tokens)."
        )
    return _arrays(kept, settings)


def _usable(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, fewest_words: int
) -> tuple[list[_Texts], int, int]:
    """(texts of the pairs, how many share no prompt, how many have too short a response)."""
    usable, apart, short = [], 0, 0
    for number, row in enumerate(rows, 1):
        responses = row["chosen"], row["rejected"]
        found = response_texts(row.get("prompt", ""), responses, number, tokenizer)
        if found is None:
            apart += 1
        elif any(0 < len(text.split()) < fewest_words for text in found[1]):
            short += 1
        else:
            prompt, (chosen, rejected) = found
            usable.append(_Texts(prompt, chosen, rejected, row.get("margin", 0.0)))
    return usable, apart, short


def _tokenize(
    pairs: Sequence[_Texts], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> list[_Pair]:
    eos, most = tokenizer.eos_token_id, settings.max_prompt_length
    texts = [pair.prompt for pair in pairs]
    prompts = tokenize_prompts(tokenizer, texts, settings.prompt_suffix, most)
    chosen = encode(tokenizer, [pair.chosen for pair in pairs])
    rejected = encode(tokenizer, [pair.rejected for pair in pairs])
    return [
        _Pair(prompt, with_eos(better, eos), with_eos(worse, eos), pair.margin)
        for pair, prompt, better, worse in zip(pairs, prompts, chosen, rejected, strict=True)
    ]


def _warn(kept: Sequence[_Pair], empty: int, equal: int, total: int, settings: Settings) -> None:
    most_prompt, most = settings.max_prompt_length, settings.max_response_length
    warn(empty, total, "pairs were dropped because a response is empty.")
    warn(equal, total, "pairs were dropped because their two responses are equal.")
    long = [pair.prompt for pair in kept if len(pair.prompt.tokens) > most_prompt]
    limit = f"data.max_prompt_length ({most_prompt} tokens)"
    warn_of_cut_prompts(long, len(kept), limit, settings.prompt_suffix)
    warn(
        sum(len(response) > most for pair in kept for response in (pair.chosen, pair.rejected)),
        2 * len(kept),
        f"responses lost their right end: they exceed data.max_response_length ({most} tokens).",
    )


def _arrays(pairs: Sequence[_Pair], settings: Settings) -> PairBatch:
    most_prompt, most = settings.max_prompt_length, settings.max_response_length
    prompts = [pair.prompt.cut(most_prompt) for pair in pairs]
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
        valid=real,
    )
