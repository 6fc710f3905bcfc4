"""Responses as tokens of the policy, as texts, and as tokens of another tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.data.chat import text_parts
from rlhf_jax.data.encoding import (
    check_joints,
    encode,
    pad_right,
    warn_of_long_responses,
    width,
    with_eos,
)
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.parallel import hosts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# (tokens, mask), int[N, T] and bool[N, T], right-padded: one response to each of N prompts.
Tokens = tuple[Any, Any]


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Any, mask: Any) -> list[str]:
    """The texts of i32[B, T] tokens under bool[B, T], without special tokens; all hosts call it."""
    tokens, mask = (np.asarray(array) for array in hosts.to_host((tokens, mask)))
    sequences = [ids[real].tolist() for ids, real in zip(tokens, mask, strict=True)]
    return tokenizer.batch_decode(
        sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Responses:
    """K responses to each of N prompts, as tokens and, decoded on first use, as texts.

    Attributes:
      tokenizer: of the tokens.
      prompts, prompt_mask: int[N, P] and bool[N, P], left-padded.
      candidates: the policy's responses, optionally followed by the reference responses; K in all.
      columns: the other columns of the data set, N values each.
      indices: int[N], the example of the data set that each prompt comes from.
      stop_token_ids: that end a response; by default the tokenizer's EOS.
      turns: N prompts as they stand in the data, messages or texts; () where they are not known.
    """

    tokenizer: PreTrainedTokenizerFast
    prompts: Any
    prompt_mask: Any
    candidates: Sequence[Tokens]
    columns: dict[str, list[Any]]
    indices: Any
    stop_token_ids: tuple[int, ...] = ()
    turns: Sequence[Any] = ()

    @functools.cached_property
    def prompt_texts(self) -> list[str]:
        """The prompts without special tokens."""
        return decode(self.tokenizer, self.prompts, self.prompt_mask)

    @functools.cached_property
    def texts(self) -> list[list[str]]:
        """K lists of N texts without special tokens."""
        return [decode(self.tokenizer, tokens, mask) for tokens, mask in self.candidates]

    @functools.cached_property
    def ids(self) -> list[list[list[int]]]:
        """K lists of the N responses as tokens, without padding."""
        pairs = ((np.asarray(tokens), np.asarray(mask)) for tokens, mask in self.candidates)
        return [
            [tokens[real].tolist() for tokens, real in zip(*pair, strict=True)] for pair in pairs
        ]

    @functools.cached_property
    def ended(self) -> list[np.ndarray]:
        """K arrays bool[N]: whether a stop token is the last one of each response."""
        stops, all_ended = self.stop_token_ids or (self.tokenizer.eos_token_id,), []
        for tokens, mask in ((np.asarray(x), np.asarray(y)) for x, y in self.candidates):
            is_last = mask & (np.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True))
            all_ended.append((np.isin(tokens, stops) & is_last).any(axis=1))
        return all_ended


def reference_tokens(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> Tokens:
    """The reference responses of "references" examples, EOS appended once, int and bool [N, T].

    Each keeps its first `max_response_length` tokens, as the responses of pairs do.
    """
    limit, eos = settings.max_response_length, tokenizer.eos_token_id
    parts = [text_parts(each, n, tokenizer, True) for n, each in enumerate(examples, 1)]
    check_joints(tokenizer, examples, [(prompt or "", text) for prompt, text in parts])
    texts = [text for _, text in parts]
    responses = [with_eos(ids, eos) for ids in encode(tokenizer, texts)]
    warn_of_long_responses(responses, limit, "reference responses")
    return pad_right([ids[:limit] for ids in responses], width(list(map(len, responses)), limit))


def retokenize(
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    prompts: Sequence[str],
    texts: Sequence[Sequence[str]],
    ended: Sequence[Sequence[bool] | np.ndarray],
) -> tuple[list[list[int]], list[list[list[int]]], int]:
    """N prompts and K responses to each as tokens of another tokenizer than the policy's.

    Prompt and response are tokenized apart, as in training. EOS is appended to responses that ended
    with it (`ended`, K lists of N), and to empty ones, since the score is read at the last token;
    an empty prompt becomes BOS, or EOS without a BOS. A response keeps its first `max_length - 1`
    tokens, and a prompt the last tokens that fit beside its longest response.

    Returns:
      (prompts, K lists of responses, number of the N prompts where anything was cut).
    """
    eos = tokenizer.eos_token_id
    start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    full_prompts = [ids or [start] for ids in encode(tokenizer, prompts)]
    responses = []
    for candidates, have_eos in zip(texts, ended, strict=True):
        pairs = zip(encode(tokenizer, candidates), have_eos, strict=True)
        responses.append([with_eos(ids, eos) if end or not ids else ids for ids, end in pairs])
    longest = [max(map(len, candidates)) for candidates in zip(*responses, strict=True)]
    lengths = list(zip(full_prompts, longest, strict=True))
    num_cut = sum(len(prompt) + length > max_length for prompt, length in lengths)
    kept = [prompt[-max(1, max_length - length) :] for prompt, length in lengths]
    return kept, [[ids[: max_length - 1] for ids in column] for column in responses], num_cut
