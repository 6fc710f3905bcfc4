"""Prompts as tokens, and their truncation: from the left, or before a fixed suffix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rlhf_jax.data.encoding import encode, warn
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Prompt(NamedTuple):
    """The token ids of a prompt.

    Attributes:
      tokens: all tokens.
      ending: the last of them, which truncation keeps; empty if the prompt has no fixed suffix.
    """

    tokens: list[int]
    ending: list[int]

    def truncated(self, max_length: int) -> list[int]:
        """At most `max_length` tokens: the last ones, or the first ones and the ending.

        >>> Prompt([1, 2, 3, 4], []).truncated(2), Prompt([1, 2, 3, 4], [4]).truncated(2)
        ([3, 4], [1, 4])
        """
        if len(self.tokens) <= max_length:
            return self.tokens
        if not self.ending or len(self.ending) > max_length:
            return self.tokens[len(self.tokens) - max_length :]
        return self.tokens[: max_length - len(self.ending)] + self.ending


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], suffix: str | None, max_length: int
) -> list[Prompt]:
    """The prompts as tokens; the ending of a prompt is the suffix and the white space around it.

    trlX likewise truncates the post from the right and appends "TL;DR:" again (examples/
    summarize_rlhf); it reserves five tokens for it, here they are counted.

    Raises:
      InputError: the suffix alone has more tokens than `max_length`.
    """
    endings = [_ending(text, suffix) for text in texts]
    distinct = sorted(set(endings) - {""})
    tokens = dict(zip(distinct, encode(tokenizer, distinct), strict=True)) | {"": []}
    longest = max(map(len, tokens.values()))
    if longest > max_length:
        raise InputError(
            f"data.prompt_suffix {suffix!r} has {longest} tokens, more than "
            f"data.max_prompt_length = {max_length}: set that higher."
        )
    encoded = encode(tokenizer, texts)
    return [Prompt(ids, tokens[ending]) for ids, ending in zip(encoded, endings, strict=True)]


def _ending(text: str, suffix: str | None) -> str:
    """The suffix with the white space on both sides; empty if the text does not end with it."""
    if suffix is None or not text.rstrip().endswith(suffix.strip()):
        return ""
    before = text.rstrip()[: -len(suffix.strip())].rstrip()
    return text[len(before) :]


def warn_of_truncated_prompts(
    truncated: Sequence[Prompt], total: int, limits: str, suffix: str | None
) -> None:
    """One warning for prompts truncated on the left, and one for those truncated before a suffix.

    Args:
      truncated: the prompts that exceed the limits.
      total: number of all prompts.
      limits: the exceeded settings and their values.
      suffix: `data.prompt_suffix`.
    """
    before_suffix = sum(bool(prompt.ending) for prompt in truncated)
    on_left = len(truncated) - before_suffix
    warn(on_left, total, f"prompts lost their left end: they exceed {limits}.")
    warn(
        before_suffix,
        total,
        f"prompts lost the right end of the text before {suffix!r}: they exceed {limits}.",
    )


def warn_of_long_prompts(prompts: Sequence[Prompt], settings: DataSettings) -> None:
    """Warns of the prompts that exceed `data.max_prompt_length`."""
    limit = settings.max_prompt_length
    truncated = [prompt for prompt in prompts if len(prompt.tokens) > limit]
    limits = f"data.max_prompt_length ({limit} tokens)"
    warn_of_truncated_prompts(truncated, len(prompts), limits, settings.prompt_suffix)


def warn_of_long_responses(responses: Sequence[Sequence[int]], settings: DataSettings) -> None:
    """Warns of the responses that exceed `data.max_response_length`."""
    limit = settings.max_response_length
    warn(
        sum(len(response) > limit for response in responses),
        len(responses),
        f"responses lost their right end: they exceed data.max_response_length ({limit} tokens).",
    )
