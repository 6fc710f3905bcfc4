"""Prompts for sampling responses, or beginnings of texts to be continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.chat import prompt_text
from rlhf_jax.data.encoding import pad_left, warn, width
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.truncation import Prompt, tokenize_prompts, warn_of_long_prompts
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_prompts(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> PromptBatch:
    """All prompts as one batch of NumPy arrays, in the order of the examples.

    A prompt keeps its last `max_prompt_length` tokens; if it ends with `prompt_suffix`, the first
    ones and the suffix. Messages are rendered by the tokenizer's chat template. Under
    `settings.prompt_tokens` the prompt of a `text` example is its first n tokens instead, n drawn
    uniformly by (seed, index of the example). An empty prompt becomes the single token BOS, or EOS
    if there is no BOS, so that the response has a context. Truncated and empty prompts are logged
    in one counted warning each.

    Args:
      examples: of the kind "prompts" of `load_examples`: `prompt` or `text`.
      tokenizer: converts text to tokens, and messages to text by its chat template.
      settings: the length limits.

    Returns:
      A batch with P the longest prompt rounded up to a multiple of 8, at most its limit; token 0
      and False on padding. `indices` are those of `examples`: the other columns of prompt i are
      in `examples[indices[i]]`.

    Raises:
      InputError: if there are no examples, or messages cannot be rendered.
    """
    if not examples:
        raise InputError("There are no prompts: give at least one.")
    limit, suffix = settings.max_prompt_length, settings.prompt_suffix
    texts = [prompt_text(example, number, tokenizer) for number, example in enumerate(examples, 1)]
    prompts = tokenize_prompts(tokenizer, texts, suffix, limit)
    if settings.prompt_tokens is not None:
        prompts = _beginnings(examples, prompts, settings.prompt_tokens, settings.seed)
    warn_of_long_prompts(prompts, settings)
    warn(
        sum(not prompt.tokens for prompt in prompts),
        len(prompts),
        "prompts are empty and became a single token, BOS or EOS.",
    )
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tokens = [prompt.truncated(limit) or [start] for prompt in prompts]
    indices: Any = np.arange(len(prompts), dtype=np.int32)
    return PromptBatch(
        *pad_left(tokens, width([len(prompt) for prompt in tokens], limit)), indices=indices
    )


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
