"""Texts for supervised fine-tuning: token ids, their targets, and packing into sequences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.batches import TextBatch
from rlhf_jax.data.chat import text_parts
from rlhf_jax.data.encoding import (
    Prompt,
    check_joints,
    encode,
    is_empty,
    tokenize_prompts,
    warn,
    warn_of_truncated_prompts,
    width,
    with_eos,
)
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.turns import conversation_of
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Above this share of target tokens in a sequence, logits are computed at all positions.
MAX_TARGET_SHARE = 0.75


class Text(NamedTuple):
    """One text as token ids.

    Attributes:
      tokens: the ids, EOS included unless it was truncated.
      is_target: of each token; never of the first one, because it has no context.
    """

    tokens: list[int]
    is_target: list[bool]


def encode_texts(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> TextBatch:
    """All examples of the kind "text" of `load_examples` as one batch of NumPy arrays.

    Under `settings.packing` there are several texts in a sequence; see `tokenize_texts` for the
    truncation.

    Returns:
      A batch of arrays [N, L], L the longest sequence rounded up to a multiple of 8, at most
      `settings.max_length`. Token 0, segment 0 and False on padding. `target_positions` is None if
      targets fill more than three quarters of a sequence.

    Raises:
      InputError: if no text is left, or messages cannot be rendered.
    """
    texts = tokenize_texts(examples, tokenizer, settings)
    if settings.packing:
        packed = pack([len(text.tokens) for text in texts], settings.max_length)
    else:
        packed = [[index] for index in range(len(texts))]
    return _arrays(texts, packed, settings.max_length)


def tokenize_texts(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> list[Text]:
    """The token ids of each text that has a target, in the order of the examples.

    Prompt and completion are tokenized separately, as in sampling, and EOS is appended once. A
    completion keeps its first `max_response_length` tokens, a text its first `max_length`; a
    truncated one loses its EOS. A prompt keeps its last `max_prompt_length` tokens, or fewer if
    prompt and completion together exceed `max_length`; if it ends with `prompt_suffix`, it keeps
    the first ones and the suffix. Truncated prompts, truncated texts and dropped examples are
    logged in one counted warning each.

    Under `assistant_turns` "all" a conversation is one text, whose parts are tokenized separately.
    EOS is appended after a last turn of the assistant. It keeps its first `max_length` tokens, and
    is dropped if no target is among them.

    Raises:
      InputError: if no text is left, or messages cannot be rendered.
    """
    if settings.assistant_turns == "all":
        return _tokenize_conversations(examples, tokenizer, settings)
    last_turn = settings.completion_only
    parts = [text_parts(each, n, tokenizer, last_turn) for n, each in enumerate(examples, 1)]
    heads = [prompt or "" for prompt, _ in parts]
    completions = [completion for _, completion in parts]
    check_joints(tokenizer, examples, list(zip(heads, completions, strict=True)))
    prompts = tokenize_prompts(tokenizer, heads, settings)
    encoded = zip(parts, prompts, encode(tokenizer, completions), strict=True)
    texts, truncated_prompts, num_truncated, num_dropped = [], [], 0, 0
    for (head, _), prompt, completion in encoded:
        if is_empty(completion, tokenizer.eos_token_id):
            num_dropped += 1
            continue
        is_text, limit = head is None, settings.max_length
        limit = limit if is_text else min(limit, settings.max_response_length)
        full = with_eos(completion, tokenizer.eos_token_id)
        kept = full[:limit]
        num_truncated += len(kept) < len(full)
        room = min(settings.max_prompt_length, settings.max_length - len(kept))
        if len(prompt.tokens) > room:
            truncated_prompts.append(prompt)
        context = prompt.truncated(room)
        tokens = context + kept
        target_start = max(1, len(context)) if settings.completion_only else 1
        texts.append(Text(tokens, [place >= target_start for place in range(len(tokens))]))
    _warn(truncated_prompts, num_truncated, num_dropped, len(parts), settings)
    if not texts:
        raise InputError(
            f"No text is left to train on: all {len(parts)} examples are empty (an empty "
            "completion counts as an empty example)."
        )
    return texts


def _tokenize_conversations(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> list[Text]:
    """The token ids of each conversation that has a target, which are those of the assistant."""
    conversations = [conversation_of(each, n, tokenizer) for n, each in enumerate(examples, 1)]
    check_joints(tokenizer, examples, [[text for text, _ in each.parts] for each in conversations])
    encoded = iter(encode(tokenizer, [text for each in conversations for text, _ in each.parts]))
    texts, num_truncated, limit = [], 0, settings.max_length
    for conversation in conversations:
        parts = [(next(encoded), is_target) for _, is_target in conversation.parts]
        tokens = list(itertools.chain.from_iterable(ids for ids, _ in parts))
        is_target = [flag for ids, flag in parts for _ in ids]
        if conversation.is_answered and tokens[-1] != tokenizer.eos_token_id:
            tokens.append(tokenizer.eos_token_id)
            is_target.append(True)
        is_target[0] = False
        num_truncated += len(tokens) > limit
        if any(is_target[:limit]):
            texts.append(Text(tokens[:limit], is_target[:limit]))
    limits, total = f"data.max_length ({limit} tokens)", len(examples)
    warn(num_truncated, total, f"texts lost their right end: they exceed {limits}.")
    reason = f"they have no token of an assistant's turn within {limits}"
    warn(total - len(texts), total, f"texts were dropped because {reason}.")
    if not texts:
        raise InputError(
            f"No text is left to train on: all {total} examples have no token of an assistant's "
            f"turn within {limits}."
        )
    return texts


def _warn(
    truncated_prompts: Sequence[Prompt],
    num_truncated: int,
    num_dropped: int,
    total: int,
    settings: DataSettings,
) -> None:
    limits = (
        f"data.max_prompt_length ({settings.max_prompt_length} tokens) or, with their completion, "
        f"data.max_length ({settings.max_length})"
    )
    warn_of_truncated_prompts(truncated_prompts, total, limits, settings.prompt_suffix)
    limits = (
        f"data.max_length ({settings.max_length} tokens) or, being completions, "
        f"data.max_response_length ({settings.max_response_length})"
    )
    warn(num_truncated, total, f"texts lost their right end: they exceed {limits}.")
    warn(num_dropped, total, "texts were dropped because they are empty.")


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing bin packing: the texts of each sequence.

    Each text, longest first (ties in the order given), goes into the first sequence that has room
    for it. That takes at most 11/9 of the fewest possible sequences and 6/9 of a sequence (Dosa
    2007); a tree of maximum remaining room finds the sequence in O(log N).

    Args:
      lengths: tokens of each text, at most `capacity`.
      capacity: tokens of a sequence.

    Returns:
      For each sequence the indices of its texts.

    >>> pack([2, 5, 3, 1], 6)
    [[1, 3], [2, 0]]
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # room[i] = max(room[2i], room[2i + 1]); leaves: sequences
    packed: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(packed):
            packed.append([])
        packed[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packed


def target_width(counts: Sequence[int], length: int) -> int | None:
    """K of `TextBatch.target_positions`: None if logits are computed at all positions.

    Args:
      counts: number of targets of each sequence.
      length: of the sequences.

    >>> target_width([3, 17], 64), target_width([49], 64)
    (24, None)
    """
    columns = width(counts, length)
    return None if columns > MAX_TARGET_SHARE * length else columns


def max_targets(settings: DataSettings) -> int:
    """Number of targets in a sequence whose prompts and completions have their maximum lengths.

    In plain texts all tokens are targets, in conversations with all turns of the assistant perhaps
    nearly all; packed sequences have more targets if prompts are short.

    >>> max_targets(DataSettings(max_length=256, max_prompt_length=100, max_response_length=20))
    40
    """
    if not settings.completion_only or settings.assistant_turns == "all":
        return settings.max_length
    text = settings.max_prompt_length + settings.max_response_length
    count = max(1, settings.max_length // text) if settings.packing else 1
    return count * min(settings.max_response_length, settings.max_length)


def _arrays(texts: Sequence[Text], packed: Sequence[Sequence[int]], max_length: int) -> TextBatch:
    used = [sum(len(texts[index].tokens) for index in sequence) for sequence in packed]
    shape = (len(packed), width(used, max_length))
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    for place, sequence in enumerate(packed):
        start = 0
        for segment, index in enumerate(sequence, 1):
            text = texts[index]
            end = start + len(text.tokens)
            tokens[place, start:end] = text.tokens
            segments[place, start:end] = segment
            loss_mask[place, start:end] = text.is_target
            start = end
    counts, positions = loss_mask.sum(axis=1), None
    if columns := target_width(counts.tolist(), shape[1]):
        positions = np.zeros((len(packed), columns), np.int32)
        positions[np.arange(columns) < counts[:, None]] = np.nonzero(loss_mask)[1]
    arrays: tuple[Any, Any, Any, Any] = (tokens, segments, loss_mask, positions)
    return TextBatch(*arrays)
