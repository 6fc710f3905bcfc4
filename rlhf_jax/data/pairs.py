"""Preference pairs: one prompt and two responses, tokenized separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.batches import PairBatch
from rlhf_jax.data.chat import response_texts
from rlhf_jax.data.encoding import encode, is_empty, pad_left, pad_right, warn, width, with_eos
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.truncation import (
    Prompt,
    tokenize_prompts,
    warn_of_long_prompts,
    warn_of_long_responses,
)
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
    """Token ids of one pair, not truncated."""

    prompt: Prompt
    chosen: list[int]
    rejected: list[int]
    margin: float


def encode_pairs(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> PairBatch:
    """All pairs as one batch of NumPy arrays.

    A response is tokenized separately from its prompt (prompt ids + response ids), as in sampling,
    and EOS is appended once. Prompts keep their last `max_prompt_length` tokens, or the first ones
    and `prompt_suffix` if they end with it; responses keep their first `max_response_length`, and
    truncated ones lose their EOS. Dropped are pairs with an empty response, one of fewer than
    `min_response_words`, or two equal responses (also after truncation), and conversations that
    differ before their last turn. Each of these is logged in one counted warning.

    Args:
      examples: of the kind "pairs" of `load_examples`: `chosen`, `rejected`, and optionally
        `prompt`, `margin`.
      tokenizer: converts text to tokens, and messages to text by its chat template.
      settings: the length limits.

    Returns:
      A batch with P and T the longest prompt and response rounded up to a multiple of 8, at most
      their limits; P is 0 if there are no prompts. Token 0 and False on padding; `valid` is True
      everywhere.

    Raises:
      InputError: if no pair is left, or messages cannot be rendered.
    """
    texts, num_different, num_short = _texts(examples, tokenizer, settings.min_response_words)
    max_length = settings.max_response_length
    kept, equal, empty = [], 0, 0
    for pair in _tokenize(texts, tokenizer, settings):
        if any(is_empty(r, tokenizer.eos_token_id) for r in (pair.chosen, pair.rejected)):
            empty += 1
        elif pair.chosen[:max_length] == pair.rejected[:max_length]:
            equal += 1
        else:
            kept.append(pair)
    total, words = len(examples), f"a response of fewer than {settings.min_response_words} words"
    warn(num_different, total, "pairs were dropped because they differ before their last turn.")
    warn(num_short, total, f"pairs were dropped because they have {words}.")
    _warn(kept, empty, equal, total, settings)
    if not kept:
        reasons = f", {num_short} {words}" * (num_short > 0)
        reasons += f", {num_different} no prompt in common" * (num_different > 0)
        raise InputError(
            f"No pair is left: of {total}, {empty} have an empty response{reasons} and {equal} "
            f"have two that are equal within data.max_response_length ({max_length} tokens)."
        )
    return _arrays(kept, settings)


def _texts(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, min_words: int
) -> tuple[list[_Texts], int, int]:
    """(pairs, number of pairs without a common prompt, number with too short a response)."""
    pairs, num_different, num_short = [], 0, 0
    for number, example in enumerate(examples, 1):
        responses = example["chosen"], example["rejected"]
        texts = response_texts(example.get("prompt", ""), responses, number, tokenizer)
        if texts is None:
            num_different += 1
        elif any(0 < len(text.split()) < min_words for text in texts[1]):
            num_short += 1
        else:
            prompt, (chosen, rejected) = texts
            pairs.append(_Texts(prompt, chosen, rejected, example.get("margin", 0.0)))
    return pairs, num_different, num_short


def _tokenize(
    pairs: Sequence[_Texts], tokenizer: PreTrainedTokenizerFast, settings: DataSettings
) -> list[_Pair]:
    eos, max_length = tokenizer.eos_token_id, settings.max_prompt_length
    texts = [pair.prompt for pair in pairs]
    prompts = tokenize_prompts(tokenizer, texts, settings.prompt_suffix, max_length)
    chosen = encode(tokenizer, [pair.chosen for pair in pairs])
    rejected = encode(tokenizer, [pair.rejected for pair in pairs])
    return [
        _Pair(prompt, with_eos(better, eos), with_eos(worse, eos), pair.margin)
        for pair, prompt, better, worse in zip(pairs, prompts, chosen, rejected, strict=True)
    ]


def _warn(
    kept: Sequence[_Pair], empty: int, equal: int, total: int, settings: DataSettings
) -> None:
    warn(empty, total, "pairs were dropped because a response is empty.")
    warn(equal, total, "pairs were dropped because their two responses are equal.")
    warn_of_long_prompts([pair.prompt for pair in kept], settings)
    responses = [response for pair in kept for response in (pair.chosen, pair.rejected)]
    warn_of_long_responses(responses, settings)


def _arrays(pairs: Sequence[_Pair], settings: DataSettings) -> PairBatch:
    max_prompt, max_response = settings.max_prompt_length, settings.max_response_length
    prompts = [pair.prompt.truncated(max_prompt) for pair in pairs]
    chosen = [pair.chosen[:max_response] for pair in pairs]
    rejected = [pair.rejected[:max_response] for pair in pairs]
    response_width = width([len(response) for response in chosen + rejected], max_response)
    margin: Any = np.asarray([pair.margin for pair in pairs], np.float32)
    valid: Any = np.ones(len(pairs), bool)
    return PairBatch(
        *pad_left(prompts, width([len(prompt) for prompt in prompts], max_prompt)),
        *pad_right(chosen, response_width),
        *pad_right(rejected, response_width),
        margin=margin,
        valid=valid,
    )
