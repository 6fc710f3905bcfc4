"""Prompts for sampling responses, or beginnings of texts to be continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.chat import prompt_text
from rlhf_jax.data.encoding import (
    Prompt,
    pad_prompts,
    tokenize_prompts,
    warn,
    warn_of_long_prompts,
)
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_prompts(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> PromptBatch:
    """All prompts as one batch of NumPy arrays, in the order of the examples.

    Examples are of the kind "prompts" of `load_examples`. A prompt keeps its last
    `max_prompt_length` tokens; if it ends with `prompt_suffix`, the first ones and the suffix.
    Under `prompt_tokens` the prompt of a `text` example is its first n tokens instead, n drawn
    uniformly by (seed, index of the example). An empty prompt becomes the single token BOS, or EOS
    if there is no BOS, so that the response has a context. Truncated and empty prompts are logged
    in one counted warning each.

    Returns:
      A batch with P the longest prompt rounded up to a multiple of 8, at most its limit; token 0
      and False on padding. `indices` are those of `examples`: the other columns of prompt i are
      in `examples[indices[i]]`.

    Raises:
      InputError: if there are no examples, or messages cannot be rendered.
    """
    if not examples:
        raise InputError("There are no prompts: give at least one.")
    texts = [prompt_text(example, number, tokenizer) for number, example in enumerate(examples, 1)]
    prompts = tokenize_prompts(tokenizer, texts, settings)
    if settings.prompt_tokens is not None:
        prompts = _beginnings(examples, prompts, settings.prompt_tokens, settings.seed)
    warn_of_long_prompts(prompts, settings)
    num_empty = sum(not prompt.tokens for prompt in prompts)
    warn(num_empty, len(prompts), "prompts are empty and became a single token, BOS or EOS.")
    limit, start = settings.max_prompt_length, tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    tokens = [prompt.truncated(limit) or [start] for prompt in prompts]
    indices: Any = np.arange(len(prompts), dtype=np.int32)
    return PromptBatch(*pad_prompts(tokens, limit), indices)


def _beginnings(
    examples: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    bounds: tuple[int, int],
    seed: int,
) -> list[Prompt]:
    """The first n tokens of each `text` example; n depends only on the seed and the index."""
    lengths = np.random.default_rng(seed).integers(*bounds, size=len(examples), endpoint=True)
    return [
        prompt if "prompt" in example else Prompt(prompt.tokens[:length], [])
        for example, prompt, length in zip(examples, prompts, lengths.tolist(), strict=True)
    ]
