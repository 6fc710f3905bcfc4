"""The formats of data sets: the columns of each kind of examples, under canonical names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_jax.data.chat import are_messages, contents
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

Example = dict[str, Any]
Kind = Literal["text", "pairs", "rankings", "prompts", "references"]

# The first alternative whose columns all exist is read.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("prompt", "completion"), ("messages",), ("text",)),
    "pairs": (("chosen", "rejected"), ("responses",)),
    "rankings": (("responses",), ("chosen", "rejected")),
    "prompts": (("prompt",), ("text",)),
    "references": (("prompt", "completion"),),
}
# Read if none of those exists: comparisons, for trainers that need no second response.
COMPARISON_FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("prompt", "chosen"), ("chosen",)),
    "prompts": (("messages",), ("chosen",)),
}
CANONICAL = "text prompt completion messages chosen rejected margin responses".split()
NO_LIST = "is no list of two or more texts, best first"


def examples_of(
    table: datasets.Dataset, indices: list[int], kind: Kind, path: str
) -> list[Example]:
    """The examples at `indices` of a table, checked; errors number rows from 1, as in the file."""
    columns = _format(table.column_names, kind, path)
    if kind in ("pairs", "rankings"):
        columns += tuple(c for c in ("prompt", "margin") if c in table.column_names)
    if kind not in ("prompts", "references"):
        table = table.select_columns(list(columns))
    examples = []
    for index, row in zip(indices, table.select(indices), strict=True):
        fault = next(filter(None, (_fault(row[column], column) for column in columns)), None)
        if kind == "pairs" and not fault and len(row.get("responses", ("", ""))) < 2:
            fault = f"column 'responses' {NO_LIST}"
        if kind == "references" and not fault and not contents(row["completion"]).strip():
            fault = "column 'completion' is an empty text"
        if fault:
            raise InputError(f"Row {index + 1} of {path}: {fault}.")
        examples.extend(_canonical(dict(row), kind))
    return examples


def _format(columns: Sequence[str], kind: Kind, path: str) -> tuple[str, ...]:
    """The first of a kind's alternatives whose columns all exist."""
    for alternative in (*FORMATS[kind], *COMPARISON_FORMATS.get(kind, ())):
        if all(column in columns for column in alternative):
            return alternative
    if kind == "references":
        raise InputError(
            f"{path} has the columns {', '.join(columns)}, but ppo.subtract_reference_score needs "
            "`prompt` and `completion`: name the right ones in data.columns, or set it to false."
        )
    wanted = ", or ".join(" and ".join(f"`{c}`" for c in names) for names in FORMATS[kind])
    raise InputError(
        f"{path} has the columns {', '.join(columns)}, but {kind} examples need {wanted}: "
        "name the right ones in data.columns."
    )


def _canonical(row: Example, kind: Kind) -> list[Example]:
    """The examples of one row of the file: one, or one for each pair of its responses."""
    if kind == "references":
        return [row]
    if kind == "text":
        return [_text_of_comparison(row) if "chosen" in row else row]
    if kind == "prompts":
        return [row if "prompt" in row or "text" in row else _prompt_of_messages(row)]
    ranking = ranking_of(row)
    if kind == "rankings":
        return [ranking]
    responses = ranking.pop("responses")
    return [
        {**ranking, "chosen": better, "rejected": worse}
        for rank, better in enumerate(responses)
        for worse in responses[rank + 1 :]
    ]


def _text_of_comparison(row: Example) -> Example:
    """The preferred response as a completion, or the preferred conversation as a text."""
    if "prompt" in row:
        return {"prompt": row["prompt"], "completion": row["chosen"]}
    return {"text" if isinstance(row["chosen"], str) else "messages": row["chosen"]}


def _prompt_of_messages(row: Example) -> Example:
    """The row with its messages as the prompt, without a last turn of the assistant."""
    turns = row["messages"] if "messages" in row else row["chosen"]
    if isinstance(turns, str):
        return row  # split later, by `split_conversations`
    is_answered = len(turns) > 1 and turns[-1]["role"] == "assistant"
    return {**row, "prompt": turns[:-1] if is_answered else turns}


def ranking_of(row: Example) -> Example:
    """A row as a ranking: its responses in one list, best first; their number is not checked."""
    responses = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    margin = float(row.get("margin") or 0.0)
    return {"prompt": row.get("prompt", ""), "responses": responses, "margin": margin}


def _fault(value: Any, column: str) -> str | None:
    """Why a value cannot be one of its column; None if it can."""
    if column == "margin":
        is_number = value is None or (isinstance(value, int | float) and math.isfinite(value))
        return None if is_number else f"column 'margin' holds {value!r}, not a finite number"
    if column == "messages":
        turns = 'list of turns such as {"role": "user", "content": "text"}'
        return None if are_messages(value) else f"column 'messages' is no {turns}"
    if column == "responses" and not isinstance(value, list):
        return f"column 'responses' {NO_LIST}"
    for text in value if column == "responses" else [value]:
        if not isinstance(text, str) and (column == "text" or not are_messages(text)):
            return not_text(column, text)
    return None


def not_text(column: str, value: Any) -> str:
    """Why a value that is not a text cannot be used."""
    if value is None:
        return f"column {column!r} holds nothing: give it a text"
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    if column != "text" and any(turn.get("content") is None for turn in turns):
        return f"column {column!r} holds a message without content: each has a role and a content"
    names = {int: "a number", float: "a number", bool: "a truth value", list: "a list"}
    name = names.get(type(value), "an object")
    return f"column {column!r} holds {name} ({str(value)[:40]}), not text"
