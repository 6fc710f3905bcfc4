"""Texts for supervised fine-tuning: token ids, which of them are learned, and packing into rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.batches import TextBatch
from rlhf_jax.data.chat import completion_texts, message_texts
from rlhf_jax.data.cutting import Prompt, tokenize_prompts, warn_of_cut_prompts
from rlhf_jax.data.datasets import Settings
from rlhf_jax.data.encoding import encode, is_empty, warn, width, with_eos
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Where more of a row is learned than this share, its logits are computed throughout.
MAX_TARGET_SHARE = 0.75


class Text(NamedTuple):
    """One text as token ids.

    Attributes:
      tokens: the ids, EOS included unless it was cut off.
      target_start: the first position that is to be predicted; never 0, for the first token has
        nothing before it.
    """

    tokens: list[int]
    target_start: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the texts.

    Attributes:
      texts: texts that are in the rows.
      rows: rows that they were packed into.
      tokens: real tokens, EOS included.
      learned_tokens: those that the loss counts.
      cut_prompts: prompts that lost their left end.
      cut_texts: completions or whole texts that lost their right end, and with it EOS.
      dropped: rows left out because there was nothing to learn in them.
    """

    texts: int
    rows: int
    tokens: int
    learned_tokens: int
    cut_prompts: int
    cut_texts: int
    dropped: int


def encode_texts(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> tuple[TextBatch, Report]:
    """All texts as one batch of NumPy arrays, several to a row under `settings.packing`.

    Args:
      rows: "text" rows of `load_examples`: `prompt` + `completion`, `messages` or `text`.
      tokenizer: makes the tokens, and the text of messages through its chat template.
      settings: the limits; see `tokenize_texts` for how texts are cut.

    Returns:
      (batch, report); the arrays of the batch are [N, L], L the longest row rounded up to a
      multiple of 8, at most `settings.max_length`. Token 0, segment 0 and False on padding.
      `learned` is there where no row learns more than three quarters of its places.

    Raises:
      InputError: if no row is left, or messages cannot be rendered.
    """
    texts, counts = tokenize_texts(rows, tokenizer, settings)
    lengths = [len(text.tokens) for text in texts]
    if settings.packing:
        packed = pack(lengths, settings.max_length)
    else:
        packed = [[index] for index in range(len(texts))]
    batch = _fill(texts, packed, settings.max_length)
    report = Report(
        texts=len(texts),
        rows=len(packed),
        tokens=sum(lengths),
        learned_tokens=int(batch.loss_mask.sum()),
        **counts,
    )
    return batch, report


def tokenize_texts(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> tuple[list[Text], dict[str, int]]:
    """The token ids of each text that has something to learn, in the order of the rows.

    Prompt and completion are tokenized apart, as they are when the model answers, and EOS is
    appended once. A completion keeps its first `max_response_length` tokens, a whole text its first
    `max_length`; what loses its right end loses its EOS. A prompt keeps its last
    `max_prompt_length` tokens, or fewer if that and its completion exceed `max_length`; if it ends
    with `prompt_suffix`, the first ones and that.

    Returns:
      (texts, counts); the counts are `cut_prompts`, `cut_texts` and `dropped`, each of which is
      also logged in one warning.

    Raises:
      InputError: if no row is left, or messages cannot be rendered.
    """
    parts = [_parts(row, number, tokenizer, settings) for number, row in enumerate(rows, 1)]
    heads = [prompt or "" for prompt, _ in parts]
    prompts = tokenize_prompts(tokenizer, heads, settings.prompt_suffix, settings.max_prompt_length)
    completions = encode(tokenizer, [completion for _, completion in parts])
    counts = {"cut_prompts": 0, "cut_texts": 0, "dropped": 0}
    texts, cut_prompts = [], []
    for (prompt, _), head, tail in zip(parts, prompts, completions, strict=True):
        if is_empty(tail, tokenizer.eos_token_id):
            counts["dropped"] += 1
            continue
        most = settings.max_length
        if prompt is not None:
            most = min(most, settings.max_response_length)
        whole = with_eos(tail, tokenizer.eos_token_id)
        kept = whole[:most]
        room = min(settings.max_prompt_length, settings.max_length - len(kept))
        counts["cut_texts"] += len(kept) < len(whole)
        if len(head.tokens) > room:
            cut_prompts.append(head)
        before = head.cut(room)
        target_start = max(1, len(before)) if settings.completion_only else 1
        texts.append(Text(before + kept, target_start))
    counts["cut_prompts"] = len(cut_prompts)
    _warn(cut_prompts, counts, len(parts), settings)
    if not texts:
        raise InputError(
            f"No text is left to learn from: all {len(parts)} rows are empty (an empty completion "
            "counts as an empty row)."
        )
    return texts, counts


def _warn(
    cut_prompts: Sequence[Prompt], counts: Mapping[str, int], total: int, settings: Settings
) -> None:
    limits = (
        f"data.max_prompt_length ({settings.max_prompt_length} tokens) or, with their completion, "
        f"data.max_length ({settings.max_length})"
    )
    warn_of_cut_prompts(cut_prompts, total, limits, settings.prompt_suffix)
    warn(
        counts["cut_texts"],
        total,
        "texts lost their right end: they exceed data.max_length "
        f"({settings.max_length} tokens) or, being completions, data.max_response_length "
        f"({settings.max_response_length}).",
    )
    warn(counts["dropped"], total, "texts were dropped because they are empty.")


def _parts(
    row: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> tuple[str | None, str]:
    """(prompt, completion) of a row; the prompt is None where all of it is one text."""
    if "completion" in row:
        return completion_texts(row["prompt"], row["completion"], number, tokenizer)
    if "messages" in row:
        return message_texts(row["messages"], number, tokenizer, settings.completion_only)
    return None, row["text"]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing bin packing: which texts go into which row.

    Each text, longest first (ties in the order given), goes into the first row that has room for
    it. That takes at most 11/9 of the fewest possible rows and 6/9 of a row (Dosa 2007); a tree
    of the largest room left finds the row in O(log N).

    Args:
      lengths: tokens of each text, at most `capacity`.
      capacity: tokens of a row.

    Returns:
      For each row the indices of its texts.

    >>> pack([2, 5, 3, 1], 6)
    [[1, 3], [2, 0]]
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # room[i] = max(room[2i], room[2i + 1]); leaves are rows
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def target_width(counts: Sequence[int], length: int) -> int | None:
    """K of `TextBatch.target_positions` for rows with these numbers of targets; None if most are.

    >>> target_width([3, 17], 64), target_width([49], 64)
    (24, None)
    """
    most = width(counts, length)
    return None if most > MAX_TARGET_SHARE * length else most


def max_targets(settings: Settings) -> int:
    """How many tokens a row learns whose prompts and completions are as long as they may be.

    Rows of plain text learn all of their tokens, and packed ones more where prompts are short.

    >>> max_targets(Settings(max_length=256, max_prompt_length=100, max_response_length=20))
    40
    """
    if not settings.completion_only:
        return settings.max_length
    text = settings.max_prompt_length + settings.max_response_length
    count = max(1, settings.max_length // text) if settings.packing else 1
    return count * min(settings.max_response_length, settings.max_length)


def _fill(texts: Sequence[Text], packed: Sequence[Sequence[int]], most: int) -> TextBatch:
    """The arrays of the packed texts."""
    used = [sum(len(texts[index].tokens) for index in row) for row in packed]
    shape = (len(packed), width(used, most))
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, bool)
    for place, row in enumerate(packed):
        start = 0
        for segment, index in enumerate(row, 1):
            text = texts[index]
            end = start + len(text.tokens)
            tokens[place, start:end] = text.tokens
            segments[place, start:end] = segment
            loss_mask[place, start + text.target_start : end] = True
            start = end
    arrays: tuple[Any, Any, Any, Any] = (tokens, segments, loss_mask, _target_positions(loss_mask))
    return TextBatch(*arrays)


def _target_positions(loss_mask: Any) -> Any:
    """i32[N, K], the places of the tokens that are learned, 0 behind them; None if most are."""
    counts = loss_mask.sum(axis=1)
    most = target_width(counts.tolist(), loss_mask.shape[1])
    if most is None:
        return None
    places = np.zeros((len(counts), most), np.int32)
    places[np.arange(most) < counts[:, None]] = np.nonzero(loss_mask)[1]
    return places
