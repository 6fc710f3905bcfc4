"""Rankings: one prompt and several responses, best first, tokenized apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.batches import RankingBatch
from rlhf_jax.data.chat import response_texts
from rlhf_jax.data.cutting import Prompt, tokenize_prompts, warn_of_cut_prompts
from rlhf_jax.data.datasets import Settings
from rlhf_jax.data.encoding import encode, is_empty, pad_left, pad_right, warn, width, with_eos
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class _Ranking(NamedTuple):
    """Token ids of one ranking: the prompt whole, the responses without those that are dropped."""

    prompt: Prompt
    responses: list[list[int]]
    empty: int
    repeated: int
    short: int


def encode_rankings(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> RankingBatch:
    """All rankings as one batch of NumPy arrays.

    Tokens, EOS and limits are those of `encode_pairs`. Of each ranking the empty responses are
    dropped, those of fewer than `min_response_words`, and those that equal a better one (after
    cutting, too); then rankings in which fewer than two are left. Each of these is logged in one
    counted warning.

    Args:
      rows: "rankings" rows of `load_examples`: `responses`, best first, and perhaps `prompt`.
      tokenizer: makes the tokens, and the text of messages through its chat template.
      settings: the limits.

    Returns:
      A batch with K responses in the longest ranking, and P and T the longest prompt and response
      rounded up to a multiple of 8, at most their limits; P is 0 if there is no prompt anywhere.
      Token 0 and False on padding, and in the places that a shorter ranking leaves free.

    Raises:
      InputError: if no ranking is left, or messages cannot be rendered.
    """
    found = list(_tokenize(rows, tokenizer, settings))
    kept = [ranking for ranking in found if len(ranking.responses) > 1]
    if not kept:
        raise InputError(
            f"No ranking is left: of {len(rows)}, none has two responses that are neither empty "
            f"nor equal within data.max_response_length ({settings.max_response_length} tokens)."
        )
    _warn(kept, len(rows), settings)
    return _arrays(kept, settings)


def _tokenize(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> Iterator[_Ranking]:
    eos, most = tokenizer.eos_token_id, settings.max_response_length
    # Without a prompt in common there is nothing to compare; such rankings lose all responses.
    found = [
        response_texts(row.get("prompt", ""), row["responses"], number, tokenizer) or ("", [])
        for number, row in enumerate(rows, 1)
    ]
    prompts = tokenize_prompts(
        tokenizer,
        [prompt for prompt, _ in found],
        settings.prompt_suffix,
        settings.max_prompt_length,
    )
    fewest = settings.min_response_words
    kept = [[r for r in texts if not 0 < len(r.split()) < fewest] for _, texts in found]
    tokens = iter(encode(tokenizer, list(itertools.chain.from_iterable(kept))))
    for (_, texts), long_enough, prompt in zip(found, kept, prompts, strict=True):
        written = [with_eos(next(tokens), eos) for _ in long_enough]
        full = [response for response in written if not is_empty(response, eos)]
        # The first of those that are equal stands in the best place.
        different = {tuple(response[:most]): response for response in reversed(full)}
        responses = [response for response in full if different[tuple(response[:most])] is response]
        empty, repeated = len(written) - len(full), len(full) - len(responses)
        yield _Ranking(prompt, responses, empty, repeated, len(texts) - len(long_enough))


def _warn(kept: Sequence[_Ranking], total: int, settings: Settings) -> None:
    most_prompt, most = settings.max_prompt_length, settings.max_response_length
    responses = sum(len(each.responses) + each.empty + each.repeated + each.short for each in kept)
    warn(
        total - len(kept),
        total,
        "rankings were dropped because they have no two responses that differ.",
    )
    warn(
        sum(each.short for each in kept),
        responses,
        "ranked responses were dropped because they have fewer than "
        f"{settings.min_response_words} words.",
    )
    warn(
        sum(each.empty for each in kept),
        responses,
        "ranked responses were dropped because they are empty.",
    )
    warn(
        sum(each.repeated for each in kept),
        responses,
        "ranked responses were dropped because they equal a better one.",
    )
    long = [each.prompt for each in kept if len(each.prompt.tokens) > most_prompt]
    limit = f"data.max_prompt_length ({most_prompt} tokens)"
    warn_of_cut_prompts(long, len(kept), limit, settings.prompt_suffix)
    warn(
        sum(len(response) > most for each in kept for response in each.responses),
        sum(len(each.responses) for each in kept),
        f"responses lost their right end: they exceed data.max_response_length ({most} tokens).",
    )


def _arrays(rankings: Sequence[_Ranking], settings: Settings) -> RankingBatch:
    most_prompt, most = settings.max_prompt_length, settings.max_response_length
    prompts = [ranking.prompt.cut(most_prompt) for ranking in rankings]
    places = max(len(ranking.responses) for ranking in rankings)
    responses: list[list[int]] = []
    for ranking in rankings:
        responses += [response[:most] for response in ranking.responses]
        responses += [[]] * (places - len(ranking.responses))
    longest = width([len(response) for response in responses], most)
    flat = pad_right(responses, longest)
    tokens, mask = (array.reshape(len(rankings), places, longest) for array in flat)
    return RankingBatch(
        *pad_left(prompts, width([len(prompt) for prompt in prompts], most_prompt)),
        responses=tokens,
        mask=mask,
    )
