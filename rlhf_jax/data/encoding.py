"""Shared by the encoders of all kinds: token ids, EOS, truncation, padding and counted warnings."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.data.examples import place_of
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("rlhf_jax.data")

MULTIPLE = 8  # widths are multiples of this, so that similar data sets share compiled programs


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


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens that the text does not contain itself."""
    if not texts:
        return []
    # `verbose` would warn of every text beyond the model's length; texts are truncated later.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], settings: DataSettings
) -> list[Prompt]:
    """The prompts as tokens; the ending of a prompt is the suffix and the white space around it.

    trlX likewise truncates the post from the right and appends "TL;DR:" again (examples/
    summarize_rlhf); it reserves five tokens for it, here they are counted.

    Raises:
      InputError: the suffix alone has more tokens than `max_prompt_length`.
    """
    endings = [_ending(text, settings.prompt_suffix) for text in texts]
    distinct = sorted(set(endings) - {""})
    tokens = dict(zip(distinct, encode(tokenizer, distinct), strict=True)) | {"": []}
    longest = max(map(len, tokens.values()))
    if longest > settings.max_prompt_length:
        raise InputError(
            f"data.prompt_suffix {settings.prompt_suffix!r} has {longest} tokens, more than "
            f"data.max_prompt_length = {settings.max_prompt_length}: set that higher."
        )
    encoded = encode(tokenizer, texts)
    return [Prompt(ids, tokens[ending]) for ids, ending in zip(encoded, endings, strict=True)]


def check_joints(
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Mapping[str, Any]],
    texts: Sequence[Sequence[str]],
) -> None:
    """Raises if prompt ids + completion ids are another text than prompt and completion together.

    A SentencePiece-like tokenizer may put a space before each of them; the model would be trained
    on spaces that the data do not have, and would not learn others. Some 256 texts are checked.

    Args:
      examples: for the place of the fault.
      texts: the prompt and a completion of each example, either of which may be empty; or the
        parts of a conversation.
    """
    joints = [
        (place_of(example, number), [part for part in parts if part])
        for number, (example, parts) in enumerate(zip(examples, texts), 1)
        if sum(map(bool, parts)) > 1
    ]
    joints = joints[:: len(joints) // 256 + 1]
    together = encode(tokenizer, ["".join(parts) for _, parts in joints])
    apart = [list(itertools.chain(*encode(tokenizer, parts))) for _, parts in joints]
    decode = functools.partial(tokenizer.batch_decode, clean_up_tokenization_spaces=False)
    for (place, _), one, other in zip(joints, decode(together), decode(apart), strict=True):
        if one != other:
            at = len(os.path.commonprefix([one, other]))
            near = slice(max(0, at - 20), at + 20)
            raise InputError(
                f"The tokenizer reads prompt and completion of {place} apart as {other[near]!r}, "
                f"together as {one[near]!r}: use a byte-level tokenizer, or move the white space "
                "between them to the beginning of the completion."
            )


def _ending(text: str, suffix: str | None) -> str:
    """The suffix with the white space on both sides; empty if the text does not end with it."""
    stripped = text.rstrip()
    if suffix is None or not stripped.endswith(suffix.strip()):
        return ""
    return text[len(stripped.removesuffix(suffix.strip()).rstrip()) :]


def with_eos(tokens: list[int], eos: int) -> list[int]:
    """The tokens with EOS at the end, appended unless they end with it."""
    return tokens if tokens and tokens[-1] == eos else [*tokens, eos]


def is_empty(tokens: Sequence[int], eos: int) -> bool:
    """Whether there is no token before EOS."""
    return not tokens or (len(tokens) == 1 and tokens[0] == eos)


def width(lengths: Sequence[int], max_width: int) -> int:
    """The longest length rounded up to a multiple of 8, but at most `max_width`.

    >>> width([3, 17], 128), width([3, 17], 20), width([0], 20)
    (24, 20, 0)
    """
    longest = max(lengths, default=0)
    return min(max_width, -(-longest // MULTIPLE) * MULTIPLE)


# Arrays are NumPy arrays here, and typed `Any` because batches.py declares arrays of JAX.
def pad_left(sequences: Sequence[Sequence[int]], length: int) -> tuple[Any, Any]:
    """(tokens i32[N, length], mask bool[N, length]) with the padding, token 0, on the left."""
    tokens, mask = pad_right([sequence[::-1] for sequence in sequences], length)
    return np.ascontiguousarray(tokens[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])


def pad_right(sequences: Sequence[Sequence[int]], length: int) -> tuple[Any, Any]:
    """(tokens i32[N, length], mask bool[N, length]) with the padding, token 0, on the right."""
    lengths = np.asarray([len(sequence) for sequence in sequences], np.int64)
    mask = np.arange(length)[None, :] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.fromiter(itertools.chain.from_iterable(sequences), np.int32)
    return tokens, mask


def pad_prompts(prompts: Sequence[list[int]], max_length: int) -> tuple[Any, Any]:
    """`pad_left` to the `width` of prompts of at most `max_length` tokens."""
    return pad_left(prompts, width([len(prompt) for prompt in prompts], max_length))


def warn(count: int, total: int, message: str) -> None:
    """Logs one warning, "COUNT of TOTAL MESSAGE", unless the count is 0."""
    if count:
        logger.warning("%d of %d %s", count, total, message)


def warn_of_truncated_prompts(
    truncated: Sequence[Prompt], total: int, limits: str, suffix: str | None
) -> None:
    """One warning for prompts truncated on the left, and one for those truncated before a suffix.

    `limits` names the exceeded settings and their values, `suffix` is `data.prompt_suffix`.
    """
    before_suffix = sum(bool(prompt.ending) for prompt in truncated)
    on_left = len(truncated) - before_suffix
    warn(on_left, total, f"prompts lost their left end: they exceed {limits}.")
    where = f"prompts lost the right end of the text before {suffix!r}"
    warn(before_suffix, total, f"{where}: they exceed {limits}.")


def warn_of_long_prompts(prompts: Sequence[Prompt], settings: DataSettings) -> None:
    """Warns of the prompts that exceed `data.max_prompt_length`."""
    limit = settings.max_prompt_length
    truncated = [prompt for prompt in prompts if len(prompt.tokens) > limit]
    limits = f"data.max_prompt_length ({limit} tokens)"
    warn_of_truncated_prompts(truncated, len(prompts), limits, settings.prompt_suffix)


def warn_of_long_responses(
    responses: Sequence[Sequence[int]], max_length: int, name: str = "responses"
) -> None:
    """Warns of the responses that exceed `data.max_response_length`."""
    warn(
        sum(len(response) > max_length for response in responses),
        len(responses),
        f"{name} lost their right end: they exceed data.max_response_length ({max_length} tokens).",
    )
