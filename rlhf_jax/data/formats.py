"""The formats of data sets: which columns a kind of rows needs, and rows under canonical names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_jax.data.chat import are_messages, contents
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
Kind = Literal["text", "pairs", "rankings", "prompts", "references"]

# The first alternative whose columns are all there is the one that is read.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("prompt", "completion"), ("messages",), ("text",)),
    "pairs": (("chosen", "rejected"), ("responses",)),
    "rankings": (("responses",), ("chosen", "rejected")),
    "prompts": (("prompt",), ("text",)),
    "references": (("prompt", "completion"),),
}
# Read where none of those is there: comparisons, for stages that need no second response.
OF_COMPARISONS: dict[str, tuple[tuple[str, ...], ...]] = {
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


def examples_of(table: datasets.Dataset, indices: list[int], kind: Kind, path: str) -> list[Row]:
    """The rows at `indices`, checked; errors count rows from 1, as in the file."""
    found = _format(table.column_names, kind, path)
    kept = [c for c in (*found, *OPTIONAL[kind]) if c in table.column_names]
    if kind not in ("prompts", "references"):
        table = table.select_columns(kept)
    rows = []
    for index, row in zip(indices, table.select(indices), strict=True):
        for column in kept:
            _check_value(row[column], column, index + 1, path)
        if kind == "pairs":
            _check_two(row, index + 1, path)
        if kind == "references" and not contents(row["completion"]).strip():
            raise InputError(f"Row {index + 1} of {path}: column 'completion' is an empty text.")
        rows.extend(_canonical(dict(row), kind))
    return rows


def _format(columns: Sequence[str], kind: Kind, path: str) -> tuple[str, ...]:
    """The first of a kind's alternatives whose columns are all there."""
    for alternative in (*FORMATS[kind], *OF_COMPARISONS.get(kind, ())):
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


def _canonical(row: Row, kind: Kind) -> list[Row]:
    """The rows that one row of the file stands for: as many as its responses have pairs."""
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
        for place, better in enumerate(ranked)
        for worse in ranked[place + 1 :]
    ]


def _text_of_comparison(row: Row) -> Row:
    """The preferred response as a completion, or the preferred conversation as a whole."""
    if "prompt" in row:
        return {"prompt": row["prompt"], "completion": row["chosen"]}
    return {"text" if isinstance(row["chosen"], str) else "messages": row["chosen"]}


def _prompt_of_messages(row: Row) -> Row:
    """The row with the turns of its messages, before the assistant's last one, as its prompt."""
    turns = row["messages"] if "messages" in row else row["chosen"]
    if isinstance(turns, str):
        return row  # it has to be split, which is done later
    ends = len(turns) > 1 and turns[-1]["role"] == "assistant"
    return {**row, "prompt": turns[:-1] if ends else turns}


def ranking_of(row: Row) -> Row:
    """The responses of a row in one list, best first; how many they are is looked at later."""
    responses = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    margin = float(row.get("margin") or 0.0)
    return {"prompt": row.get("prompt", ""), "responses": responses, "margin": margin}


def _check_two(row: Row, number: int, path: str) -> None:
    """Raises if a row has responses of which no pair can be made."""
    if "responses" in row and len(row["responses"]) < 2:
        raise InputError(
            f"Row {number} of {path}: column 'responses' is no list of two or more texts, best "
            "first."
        )


def _check_value(value: Any, column: str, number: int, path: str) -> None:
    """Raises unless a value is what its column holds."""
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
    """The sentence for a value that should have been text."""
    if value is None:
        return f"Row {number} of {path}: column {column!r} holds nothing: give it a text."
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    if column != "text" and any(turn.get("content") is None for turn in turns):
        return (
            f"Row {number} of {path}: column {column!r} holds a message without content: each has "
            "a role and a content."
        )
    what = {int: "a number", float: "a number", bool: "a truth value", list: "a list"}
    return (
        f"Row {number} of {path}: column {column!r} holds {what.get(type(value), 'an object')} "
        f"({str(value)[:40]}), not text."
    )
