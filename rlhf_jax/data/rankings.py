"""Rankings: one prompt and several responses, best first, tokenized apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.batches import RankingBatch
from rlhf_jax.data.datasets import Settings
from rlhf_jax.data.encoding import encode, is_empty, pad_left, pad_right, warn, width, with_eos
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class _Ranking(NamedTuple):
    """Token ids of one ranking: the prompt whole, the responses without those that are dropped."""

    prompt: list[int]
    responses: list[list[int]]
    empty: int
    repeated: int


def ranking_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> RankingBatch:
    """All rankings as one batch of NumPy arrays.

    Tokens, EOS and limits are those of `pair_rows`. Of each ranking the empty responses are
    dropped, and those that equal a better one (after cutting, too); then rankings in which fewer
    than two are left. Each of these is logged in one counted warning.

    Args:
      rows: "rankings" rows of `load_rows`: `responses`, best first, and perhaps `prompt`.
      tokenizer: makes the tokens.
      settings: the limits.

    Returns:
      A batch with K responses in the longest ranking, and P and T the longest prompt and response
      rounded up to a multiple of 8, at most their limits; P is 0 if there is no prompt anywhere.
      Token 0 and False on padding, and in the places that a shorter ranking leaves free.

    Raises:
      InputError: if no ranking is left.
    """
    found = list(_tokenize(rows, tokenizer, settings.max_response_length))
    kept = [ranking for ranking in found if len(ranking.responses) > 1]
    if not kept:
        raise InputError(
            f"No ranking is left: of {len(rows)}, none has two responses that are neither empty "
            f"nor equal within data.max_response_length ({settings.max_response_length} tokens)."
        )
    _warn(kept, len(rows), settings)
    return _arrays(kept, settings)


def _tokenize(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, most: int
) -> Iterator[_Ranking]:
    eos = tokenizer.eos_token_id
    prompts = encode(tokenizer, [row.get("prompt", "") for row in rows])
    texts = itertools.chain.from_iterable(row["responses"] for row in rows)
    tokens = iter(encode(tokenizer, list(texts)))
    for row, prompt in zip(rows, prompts, strict=True):
        written = [with_eos(next(tokens), eos) for _ in row["responses"]]
        full = [response for response in written if not is_empty(response, eos)]
        # The first of those that are equal stands in the best place.
        different = {tuple(response[:most]): response for response in reversed(full)}
        responses = [response for response in full if different[tuple(response[:most])] is response]
        empty, repeated = len(written) - len(full), len(full) - len(responses)
        yield _Ranking(prompt, responses, empty, repeated)


def _warn(kept: Sequence[_Ranking], total: int, settings: Settings) -> None:
    most_prompt, most = settings.max_prompt_length, settings.max_response_length
    responses = sum(len(each.responses) + each.empty + each.repeated for each in kept)
    warn(
        total - len(kept),
        total,
        "rankings were dropped because they have no two responses that differ.",
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
    warn(
        sum(len(each.prompt) > most_prompt for each in kept),
        len(kept),
        f"prompts lost their left end: they exceed data.max_prompt_length ({most_prompt} tokens).",
    )
    warn(
        sum(len(response) > most for each in kept for response in each.responses),
        sum(len(each.responses) for each in kept),
        f"responses lost their right end: they exceed data.max_response_length ({most} tokens).",
    )


def _arrays(rankings: Sequence[_Ranking], settings: Settings) -> RankingBatch:
    most_prompt, most = settings.max_prompt_length, settings.max_response_length
    prompts = [ranking.prompt[-most_prompt:] for ranking in rankings]
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
