"""Judged responses: pairs, rankings of several to one prompt, and single ones with a label."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.batches import PairBatch, RankingBatch, UnpairedBatch
from rlhf_jax.data.chat import response_texts
from rlhf_jax.data.encoding import (
    Prompt,
    check_joints,
    encode,
    is_empty,
    pad_prompts,
    pad_right,
    tokenize_prompts,
    warn,
    warn_of_long_prompts,
    warn_of_long_responses,
    width,
    with_eos,
)
from rlhf_jax.data.examples import with_columns
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class _Ranking(NamedTuple):
    """Token ids of one ranking, not truncated, and the numbers of its dropped responses.

    A ranking of conversations that differ before their last turn has no response at all.
    """

    prompt: Prompt
    responses: list[list[int]]
    margin: float
    short: int
    empty: int
    repeated: int

    @property
    def num_responses(self) -> int:
        """Number of its responses, the dropped ones included."""
        return len(self.responses) + self.short + self.empty + self.repeated


def encode_pairs(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> PairBatch:
    """All examples of the kind "pairs" of `load_examples` as one batch of NumPy arrays.

    A response is tokenized separately from its prompt (prompt ids + response ids), as in sampling,
    and EOS is appended once. Prompts keep their last `max_prompt_length` tokens, or the first ones
    and `prompt_suffix` if they end with it; responses keep their first `max_response_length`, and
    truncated ones lose their EOS.

    Dropped are pairs with an empty response, one of fewer than `min_response_words`, or two equal
    responses (also after truncation), and conversations that differ before their last turn. Each of
    these is logged in one counted warning.

    Returns:
      A batch with P and T the longest prompt and response rounded up to a multiple of 8, at most
      their limits; P is 0 if there are no prompts. Token 0 and False on padding; `valid` is True
      everywhere.

    Raises:
      InputError: if no pair is left, or messages cannot be rendered.
    """
    rankings = [with_columns(e, responses=[e["chosen"], e["rejected"]]) for e in examples]
    pairs = list(_tokenize(rankings, tokenizer, settings))
    kept = [pair for pair in pairs if len(pair.responses) == 2]
    different = sum(pair.num_responses == 0 for pair in pairs)
    short = sum(pair.short > 0 for pair in pairs)
    empty = sum(pair.empty > 0 and not pair.short for pair in pairs)
    equal = len(pairs) - len(kept) - different - short - empty
    words = f"a response of fewer than {settings.min_response_words} words"
    for count, reason in (
        (different, "they differ before their last turn"),
        (short, f"they have {words}"),
        (empty, "a response is empty"),
        (equal, "their two responses are equal"),
    ):
        warn(count, len(pairs), f"pairs were dropped because {reason}.")
    if not kept:
        reasons = f", {short} {words}" * (short > 0)
        reasons += f", {different} no prompt in common" * (different > 0)
        raise InputError(
            f"No pair is left: of {len(pairs)}, {empty} have an empty response{reasons} and "
            f"{equal} have two that are equal within data.max_response_length "
            f"({settings.max_response_length} tokens)."
        )
    prompts, prompt_mask, responses, mask = _arrays(kept, settings)
    margin: Any = np.asarray([pair.margin for pair in kept], np.float32)
    valid: Any = np.ones(len(kept), bool)
    chosen, rejected = ((responses[:, k], mask[:, k]) for k in range(2))
    return PairBatch(prompts, prompt_mask, *chosen, *rejected, margin, valid)


def encode_rankings(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> RankingBatch:
    """All examples of the kind "rankings" of `load_examples` as one batch of NumPy arrays.

    Tokens, EOS and limits are those of `encode_pairs`. Dropped are empty responses, those of fewer
    than `min_response_words`, and those equal to a better one (also after truncation); then
    rankings with fewer than two responses left. Each of these is logged in one counted warning.

    Returns:
      A batch with the widths of `encode_pairs` and K responses in the longest ranking. Token 0 and
      False on padding, and for the missing responses of a shorter ranking.

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
    warn(
        len(rankings) - len(kept),
        len(rankings),
        "rankings were dropped because they have no two responses that differ.",
    )
    total, words = sum(each.num_responses for each in kept), settings.min_response_words
    for count, reason in (
        (sum(each.short for each in kept), f"they have fewer than {words} words"),
        (sum(each.empty for each in kept), "they are empty"),
        (sum(each.repeated for each in kept), "they equal a better one"),
    ):
        warn(count, total, f"ranked responses were dropped because {reason}.")
    return RankingBatch(*_arrays(kept, settings))


def encode_unpaired(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> UnpairedBatch:
    """All examples of the kind "unpaired" of `load_examples` as one batch of NumPy arrays.

    Tokens, EOS and limits are those of `encode_pairs`. Dropped are empty responses, and those of
    fewer than `min_response_words`, each logged in one counted warning. The other response of an
    example is one to the previous prompt: of its first response the first one there, and so on, so
    that both labels occur among them where pairs are read as two examples.

    Returns:
      A batch with the widths of `encode_pairs`. Token 0 and False on padding; `valid` is True
      everywhere.

    Raises:
      InputError: no example is left, or messages cannot be rendered.
    """
    singles = [with_columns(e, responses=[e["completion"]]) for e in examples]
    all_tokenized = list(_tokenize(singles, tokenizer, settings))
    kept = [n for n, each in enumerate(all_tokenized) if each.responses]
    short = sum(each.short for each in all_tokenized)
    dropped = len(all_tokenized) - len(kept) - short
    words = f"they have fewer than {settings.min_response_words} words"
    warn(short, len(all_tokenized), f"responses were dropped because {words}.")
    warn(dropped, len(all_tokenized), "responses were dropped because they are empty.")
    if not kept:
        raise InputError(f"No response is left: all {len(all_tokenized)} are empty or too short.")
    prompts, prompt_mask, tokens, mask = _arrays([all_tokenized[n] for n in kept], settings)
    tokens, mask = tokens[:, 0], mask[:, 0]
    labels: Any = np.asarray([examples[n]["label"] for n in kept], bool)
    other = _at_previous_prompt(prompts)
    valid: Any = np.ones(len(kept), bool)
    return UnpairedBatch(
        prompts, prompt_mask, tokens, mask, tokens[other], mask[other], labels, valid
    )


def _at_previous_prompt(prompts: Any) -> Any:
    """i64[N]: for each example, with prompts i32[N, P], the index of one with the previous prompt.

    Consecutive examples with equal prompts are a group, the first following the last; an example is
    paired with that at the same place of the previous group, modulo its size. Where all prompts are
    equal, it is the previous example.
    """
    number = len(prompts)
    before = np.roll(np.arange(number), 1)
    differs = np.any(prompts != prompts[before], axis=1)
    if not differs.any():
        return before
    first = int(np.argmax(differs))
    starts = np.flatnonzero(np.roll(differs, -first))
    sizes = np.diff(np.append(starts, number))
    group = np.repeat(np.arange(len(starts)), sizes)
    place = np.arange(number) - starts[group]
    paired = starts[group - 1] + place % sizes[group - 1]
    return np.roll((paired + first) % number, first)


def _tokenize(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> Iterator[_Ranking]:
    eos, limit = tokenizer.eos_token_id, settings.max_response_length
    # Without a common prompt there is no comparison.
    parts = [
        response_texts(example, example["responses"], number, tokenizer) or ("", [])
        for number, example in enumerate(examples, 1)
    ]
    check_joints(tokenizer, examples, [(p, texts[0] if texts else "") for p, texts in parts])
    prompts = tokenize_prompts(tokenizer, [prompt for prompt, _ in parts], settings)
    min_words = settings.min_response_words
    long_enough = [[r for r in texts if not 0 < len(r.split()) < min_words] for _, texts in parts]
    tokens = iter(encode(tokenizer, list(itertools.chain.from_iterable(long_enough))))
    for example, (_, texts), kept, prompt in zip(
        examples, parts, long_enough, prompts, strict=True
    ):
        encoded = [with_eos(next(tokens), eos) for _ in kept]
        full = [response for response in encoded if not is_empty(response, eos)]
        # Reversed, so that the best of equal responses is kept.
        first = {tuple(response[:limit]): response for response in reversed(full)}
        responses = [response for response in full if first[tuple(response[:limit])] is response]
        counts = (len(texts) - len(kept), len(kept) - len(full), len(full) - len(responses))
        yield _Ranking(prompt, responses, example.get("margin", 0.0), *counts)


def _arrays(rankings: Sequence[_Ranking], settings: DataSettings) -> tuple[Any, Any, Any, Any]:
    """The fields of a `RankingBatch`, with warnings of truncated prompts and responses."""
    limit = settings.max_response_length
    warn_of_long_prompts([each.prompt for each in rankings], settings)
    warn_of_long_responses([response for each in rankings for response in each.responses], limit)
    num_responses = max(len(ranking.responses) for ranking in rankings)
    responses: list[list[int]] = []
    for ranking in rankings:
        responses += [response[:limit] for response in ranking.responses]
        responses += [[]] * (num_responses - len(ranking.responses))
    padded = pad_right(responses, width([len(response) for response in responses], limit))
    tokens, mask = (x.reshape(len(rankings), num_responses, -1) for x in padded)
    prompts = [ranking.prompt.truncated(settings.max_prompt_length) for ranking in rankings]
    return *pad_prompts(prompts, settings.max_prompt_length), tokens, mask
