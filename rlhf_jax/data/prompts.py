"""Prompts to be answered, or the beginnings of texts to be continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.chat import prompt_text
from rlhf_jax.data.cutting import Prompt, tokenize_prompts, warn_of_cut_prompts
from rlhf_jax.data.datasets import Settings
from rlhf_jax.data.encoding import pad_left, warn, width
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_prompts(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> PromptBatch:
    """All prompts as one batch of NumPy arrays, in the order of the rows.

    A prompt keeps its last `max_prompt_length` tokens; if it ends with `prompt_suffix`, the first
    ones and that. Messages are rendered by the tokenizer's chat template. Under
    `settings.prompt_tokens` the prompt of a `text` row is its first n tokens instead, n drawn
    uniformly by (seed, row). An empty prompt becomes the single token BOS, or EOS where there is no
    BOS, so that something precedes the response. What is cut or empty is logged in one counted
    warning each.

    Args:
      rows: "prompts" rows of `load_examples`: `prompt` or `text`.
      tokenizer: makes the tokens.
      settings: the limits.

    Returns:
      A batch with P the longest prompt rounded up to a multiple of 8, at most its limit; token 0
      and False on padding. `indices` counts `rows`, so that row i's other columns are
      `rows[indices[i]]`.

    Raises:
      InputError: if there are no rows, or messages cannot be rendered.
    """
    if not rows:
        raise InputError("There are no prompts: give at least one row.")
    most, suffix = settings.max_prompt_length, settings.prompt_suffix
    texts = [prompt_text(row, number, tokenizer) for number, row in enumerate(rows, 1)]
    prompts = tokenize_prompts(tokenizer, texts, suffix, most)
    if settings.prompt_tokens is not None:
        prompts = _beginnings(rows, prompts, settings.prompt_tokens, settings.seed)
    long = [prompt for prompt in prompts if len(prompt.tokens) > most]
    warn_of_cut_prompts(long, len(prompts), f"data.max_prompt_length ({most} tokens)", suffix)
    warn(
        sum(not prompt.tokens for prompt in prompts),
        len(prompts),
        "prompts are empty and became a single token, BOS or EOS.",
    )
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tokens = [prompt.cut(most) or [start] for prompt in prompts]
    indices: Any = np.arange(len(prompts), dtype=np.int32)
    return PromptBatch(
        *pad_left(tokens, width([len(prompt) for prompt in tokens], most)), indices=indices
    )


def _beginnings(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    bounds: tuple[int, int],
    seed: int,
) -> list[Prompt]:
    """The first n tokens of each `text` row; n depends on the seed and on the row's place alone."""
    lengths = np.random.default_rng(seed).integers(*bounds, size=len(rows), endpoint=True)
    return [
        prompt if "prompt" in row else Prompt(prompt.tokens[:length], [])
        for row, prompt, length in zip(rows, prompts, lengths.tolist(), strict=True)
    ]
