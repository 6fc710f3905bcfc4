"""Prompts as tokens, and how they are cut to fit: from the left, or before a set ending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rlhf_jax.data.encoding import encode, warn
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Prompt(NamedTuple):
    """The token ids of a prompt.

    Attributes:
      tokens: all of them.
      ending: those of the ending that has to stay; empty if the prompt has none.
    """

    tokens: list[int]
    ending: list[int]

    def cut(self, most: int) -> list[int]:
        """At most so many tokens: the last ones, or the first ones and the ending.

        >>> Prompt([1, 2, 3, 4], []).cut(2), Prompt([1, 2, 3, 4], [4]).cut(2)
        ([3, 4], [1, 4])
        """
        if len(self.tokens) <= most:
            return self.tokens
        if not self.ending or len(self.ending) > most:
            return self.tokens[len(self.tokens) - most :]
        return self.tokens[: most - len(self.ending)] + self.ending


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], suffix: str | None, most: int
) -> list[Prompt]:
    """The prompts as tokens; those that end with the suffix keep it, and the space before it.

    trlX cuts the post behind its beginning likewise and puts "TL;DR:" back (examples/
    summarize_rlhf); it spares five tokens for that, which here are as many as it has.

    Raises:
      InputError: the suffix alone has more tokens than a prompt may have.
    """
    endings = [_ending(text, suffix) for text in texts]
    distinct = sorted(set(endings) - {""})
    tokens = dict(zip(distinct, encode(tokenizer, distinct), strict=True)) | {"": []}
    longest = max(map(len, tokens.values()))
    if longest > most:
        raise InputError(
            f"data.prompt_suffix {suffix!r} has {longest} tokens, more than "
            f"data.max_prompt_length = {most}: set that higher."
        )
    encoded = encode(tokenizer, texts)
    return [Prompt(ids, tokens[ending]) for ids, ending in zip(encoded, endings, strict=True)]


def _ending(text: str, suffix: str | None) -> str:
    """The suffix with the white space on both sides of it; empty if the text does not end so."""
    if suffix is None or not text.rstrip().endswith(suffix.strip()):
        return ""
    before = text.rstrip()[: -len(suffix.strip())].rstrip()
    return text[len(before) :]


def warn_of_cut_prompts(
    cut: Sequence[Prompt], total: int, limits: str, suffix: str | None = None
) -> None:
    """One line for the prompts that lost their left end, and one for those cut before a suffix."""
    before_suffix = sum(bool(prompt.ending) for prompt in cut)
    warn(len(cut) - before_suffix, total, f"prompts lost their left end: they exceed {limits}.")
    warn(
        before_suffix,
        total,
        f"prompts lost the right end of what stands before {suffix!r}: they exceed {limits}.",
    )
