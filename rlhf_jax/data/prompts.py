"""Prompts to be answered, or the beginnings of texts to be continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.datasets import Settings
from rlhf_jax.data.encoding import encode, pad_left, warn, width
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prompt_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> PromptBatch:
    """All prompts as one batch of NumPy arrays, in the order of the rows.

    A prompt keeps its last `max_prompt_length` tokens. Under `settings.prompt_tokens` the prompt of
    a `text` row is its first n tokens instead, n drawn uniformly by (seed, row). An empty prompt
    becomes the single token BOS, or EOS where there is no BOS, so that something precedes the
    response. What is cut or empty is logged in one counted warning each.

    Args:
      rows: "prompts" rows of `load_rows`: `prompt` or `text`.
      tokenizer: makes the tokens.
      settings: the limits.

    Returns:
      A batch with P the longest prompt rounded up to a multiple of 8, at most its limit; token 0
      and False on padding. `indices` counts `rows`, so that row i's other columns are
      `rows[indices[i]]`.

    Raises:
      InputError: if there are no rows.
    """
    if not rows:
        raise InputError("There are no prompts: give at least one row.")
    prompts = encode(tokenizer, [row["prompt"] if "prompt" in row else row["text"] for row in rows])
    most = settings.max_prompt_length
    if settings.prompt_tokens is not None:
        prompts = _beginnings(rows, prompts, settings.prompt_tokens, settings.seed)
    warn(
        sum(len(prompt) > most for prompt in prompts),
        len(prompts),
        f"prompts lost their left end: they exceed data.max_prompt_length ({most} tokens).",
    )
    warn(
        sum(not prompt for prompt in prompts),
        len(prompts),
        "prompts are empty and became a single token, BOS or EOS.",
    )
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompts = [prompt[-most:] or [start] for prompt in prompts]
    indices: Any = np.arange(len(prompts), dtype=np.int32)
    return PromptBatch(
        *pad_left(prompts, width([len(prompt) for prompt in prompts], most)), indices=indices
    )


def _beginnings(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[list[int]],
    bounds: tuple[int, int],
    seed: int,
) -> list[list[int]]:
    """The first n tokens of each `text` row; n depends on the seed and on the row's place alone."""
    lengths = np.random.default_rng(seed).integers(*bounds, size=len(rows), endpoint=True)
    return [
        prompt if "prompt" in row else prompt[:length]
        for row, prompt, length in zip(rows, prompts, lengths.tolist(), strict=True)
    ]
