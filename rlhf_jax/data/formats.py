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
OPTIONAL: dict[str, tuple[str, ...]] = {
    "text": (),
    "pairs": ("prompt", "margin"),
    "rankings": ("prompt", "margin"),
    "prompts": (),
    "references": (),
}
CANONICAL = (
    "text",
    "prompt",
    "completion",
    "messages",
    "chosen",
    "rejected",
    "margin",
    "responses",
)


def examples_of(
    table: datasets.Dataset, indices: list[int], kind: Kind, path: str
) -> list[Example]:
    """The examples at `indices` of a table, checked; errors number rows from 1, as in the file."""
    found = _format(table.column_names, kind, path)
    kept = [c for c in (*found, *OPTIONAL[kind]) if c in table.column_names]
    if kind not in ("prompts", "references"):
        table = table.select_columns(kept)
    examples = []
    for index, row in zip(indices, table.select(indices), strict=True):
        for column in kept:
            _check_value(row[column], column, index + 1, path)
        if kind == "pairs":
            _check_num_responses(row, index + 1, path)
        if kind == "references" and not contents(row["completion"]).strip():
            raise InputError(f"Row {index + 1} of {path}: column 'completion' is an empty text.")
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
        f"{path} has the columns {', '.join(columns)}, but {kind} rows need {wanted}: name the "
        "right ones in data.columns."
    )


def _canonical(row: Example, kind: Kind) -> list[Example]:
    """The examples of one row of the file: one, or one for each pair of its responses."""
    if kind == "references":
        return [row]
    if kind == "rankings":
        return [ranking_of(row)]
    if kind == "text":
        return [_text_of_comparison(row) if "chosen" in row else row]
    if kind == "prompts":
        return [row if "prompt" in row or "text" in row else _prompt_of_messages(row)]
    common = {"prompt": row.get("prompt", ""), "margin": float(row.get("margin") or 0.0)}
    if "responses" not in row:
        return [{**common, "chosen": row["chosen"], "rejected": row["rejected"]}]
    ranked = row["responses"]
    return [
        {**common, "chosen": better, "rejected": worse}
        for rank, better in enumerate(ranked)
        for worse in ranked[rank + 1 :]
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


def _check_num_responses(row: Example, number: int, path: str) -> None:
    """Raises if a row has fewer than two responses."""
    if "responses" in row and len(row["responses"]) < 2:
        raise InputError(
            f"Row {number} of {path}: column 'responses' is no list of two or more texts, best "
            "first."
        )


def _check_value(value: Any, column: str, number: int, path: str) -> None:
    """Raises if a value does not have the type of its column."""
    if column == "margin":
        if value is not None and not _is_finite(value):
            raise InputError(
                f"Row {number} of {path}: column 'margin' holds {value!r}, not a finite number."
            )
    elif column == "messages":
        if not are_messages(value):
            raise InputError(
                f"Row {number} of {path}: column 'messages' is no list of turns such as "
                '{"role": "user", "content": "text"}.'
            )
    elif column == "responses":
        if not isinstance(value, list):
            raise InputError(
                f"Row {number} of {path}: column 'responses' is no list of two or more texts, best "
                "first."
            )
        for response in value:
            if not isinstance(response, str) and not are_messages(response):
                raise InputError(not_text(path, number, column, response))
    elif not isinstance(value, str) and (column == "text" or not are_messages(value)):
        raise InputError(not_text(path, number, column, value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def not_text(path: str, number: int, column: str, value: Any) -> str:
    """The error message for a value that is not a text."""
    if value is None:
        return f"Row {number} of {path}: column {column!r} holds nothing: give it a text."
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    if column != "text" and any(turn.get("content") is None for turn in turns):
        return (
            f"Row {number} of {path}: column {column!r} holds a message without content: each has "
            "a role and a content."
        )
    names = {int: "a number", float: "a number", bool: "a truth value", list: "a list"}
    return (
        f"Row {number} of {path}: column {column!r} holds {names.get(type(value), 'an object')} "
        f"({str(value)[:40]}), not text."
    )
