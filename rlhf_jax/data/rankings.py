"""Rankings: one prompt and several responses, best first, tokenized separately."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.batches import RankingBatch
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


class _Ranking(NamedTuple):
    """Token ids of one ranking, not truncated, and the numbers of its dropped responses."""

    prompt: Prompt
    responses: list[list[int]]
    empty: int
    repeated: int
    short: int


def encode_rankings(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> RankingBatch:
    """All rankings as one batch of NumPy arrays.

    Tokens, EOS and limits are those of `encode_pairs`. Dropped are empty responses, those of fewer
    than `min_response_words`, and those equal to a better one (also after truncation); then
    rankings with fewer than two responses left. Each of these is logged in one counted warning.

    Args:
      examples: of the kind "rankings" of `load_examples`: `responses`, best first, and optionally
        `prompt`.
      tokenizer: converts text to tokens, and messages to text by its chat template.
      settings: the length limits.

    Returns:
      A batch with K responses in the longest ranking, and P and T the longest prompt and response
      rounded up to a multiple of 8, at most their limits; P is 0 if there are no prompts. Token 0
      and False on padding, and for the missing responses of a shorter ranking.

    Raises:
      InputError: if no ranking is left, or messages cannot be rendered.
    """
    rankings = list(_tokenize(examples, tokenizer, settings))
    kept = [ranking for ranking in rankings if len(ranking.responses) > 1]
    if not kept:
        raise InputError(
            f"No ranking is left: of {len(examples)}, none has two responses that are neither "
            "empty nor equal within data.max_response_length "
            f"({settings.max_response_length} tokens)."
        )
    _warn(kept, len(examples), settings)
    return _arrays(kept, settings)


def _tokenize(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> Iterator[_Ranking]:
    eos, limit = tokenizer.eos_token_id, settings.max_response_length
    # Without a common prompt there is no comparison; such rankings lose all responses.
    parts = [
        response_texts(example.get("prompt", ""), example["responses"], number, tokenizer)
        or ("", [])
        for number, example in enumerate(examples, 1)
    ]
    prompts = tokenize_prompts(
        tokenizer,
        [prompt for prompt, _ in parts],
        settings.prompt_suffix,
        settings.max_prompt_length,
    )
    min_words = settings.min_response_words
    long_enough = [[r for r in texts if not 0 < len(r.split()) < min_words] for _, texts in parts]
    tokens = iter(encode(tokenizer, list(itertools.chain.from_iterable(long_enough))))
    for (_, texts), kept_texts, prompt in zip(parts, long_enough, prompts, strict=True):
        encoded = [with_eos(next(tokens), eos) for _ in kept_texts]
        full = [response for response in encoded if not is_empty(response, eos)]
        # Reversed, so that the best of equal responses is kept.
        first = {tuple(response[:limit]): response for response in reversed(full)}
        responses = [response for response in full if first[tuple(response[:limit])] is response]
        empty, repeated = len(encoded) - len(full), len(full) - len(responses)
        yield _Ranking(prompt, responses, empty, repeated, len(texts) - len(kept_texts))


def _warn(kept: Sequence[_Ranking], total: int, settings: DataSettings) -> None:
    responses = sum(len(each.responses) + each.empty + each.repeated + each.short for each in kept)
    warn(
        total - len(kept),
        total,
        "rankings were dropped because they have no two responses that differ.",
    )
    for count, reason in (
        (
            sum(each.short for each in kept),
            f"they have fewer than {settings.min_response_words} words",
        ),
        (sum(each.empty for each in kept), "they are empty"),
        (sum(each.repeated for each in kept), "they equal a better one"),
    ):
        warn(count, responses, f"ranked responses were dropped because {reason}.")
    warn_of_long_prompts([each.prompt for each in kept], settings)
    warn_of_long_responses([response for each in kept for response in each.responses], settings)


def _arrays(rankings: Sequence[_Ranking], settings: DataSettings) -> RankingBatch:
    max_prompt, max_response = settings.max_prompt_length, settings.max_response_length
    prompts = [ranking.prompt.truncated(max_prompt) for ranking in rankings]
    num_responses = max(len(ranking.responses) for ranking in rankings)
    responses: list[list[int]] = []
    for ranking in rankings:
        responses += [response[:max_response] for response in ranking.responses]
        responses += [[]] * (num_responses - len(ranking.responses))
    response_width = width([len(response) for response in responses], max_response)
    flat = pad_right(responses, response_width)
    tokens, mask = (x.reshape(len(rankings), num_responses, response_width) for x in flat)
    return RankingBatch(
        *pad_left(prompts, width([len(prompt) for prompt in prompts], max_prompt)),
        responses=tokens,
        mask=mask,
    )
