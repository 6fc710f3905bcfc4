"""The formats of data sets: the columns of each kind of examples, under canonical names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_jax.data.chat import are_messages, contents
from rlhf_jax.data.examples import Example, fault_at, with_columns
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from rlhf_jax.data.files import Table

Kind = Literal["text", "pairs", "rankings", "unpaired", "prompts", "references"]

# The first alternative whose columns all exist is read.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("prompt", "completion"), ("messages",), ("text",)),
    "pairs": (("chosen", "rejected"), ("responses",)),
    "rankings": (("responses",), ("chosen", "rejected")),
    "unpaired": (("prompt", "completion", "label"),),
    "prompts": (("prompt",), ("text",)),
    "references": (("prompt", "completion"),),
}
# Read if none of those exists: comparisons, for trainers that need no second response.
COMPARISON_FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("prompt", "chosen"), ("chosen",)),
    "prompts": (("messages",), ("chosen",)),
    "unpaired": (("chosen", "rejected"),),
}
CANONICAL = "text prompt completion label messages chosen rejected margin responses tools".split()
KEEP_COLUMNS = ("prompts", "references")  # the kinds whose other columns functions receive
NO_LIST = "is no list of two or more texts, best first"


def examples_of(
    table: Table, indices: Sequence[int], kind: Kind, path: str
) -> list[dict[str, Any]]:
    """The examples at `indices` of a table, checked."""
    columns = _format(table.columns, kind, path)
    optional = (
        ("prompt", "margin", "tools") if kind in ("pairs", "rankings", "unpaired") else ("tools",)
    )
    columns += tuple(c for c in optional if c in table.columns)
    examples: list[dict[str, Any]] = []
    for example in table.read(indices):
        if kind not in KEEP_COLUMNS:
            example = Example({column: example[column] for column in columns}, example.place)
        fault = next(filter(None, (_fault(example[column], column) for column in columns)), None)
        if kind == "pairs" and not fault and len(example.get("responses", ("", ""))) < 2:
            fault = f"column 'responses' {NO_LIST}: {example['responses']}"
        if kind == "unpaired" and not fault and not isinstance(_label(example), bool):
            fault = f"column 'label' holds {_shown(example['label'])}, neither true nor false"
        if kind == "references" and not fault and not contents(example["completion"]).strip():
            fault = "column 'completion' is an empty text"
        broken = next((column for column in example if not _is_unicode(example[column])), None)
        if broken:
            fault = f"column {broken!r} has half of a surrogate pair, which is no character"
        if fault:
            raise fault_at(str(example.place), f": {fault}.")
        examples.extend(_canonical(example, kind))
    return examples


def _is_unicode(value: Any) -> bool:
    """Whether all texts in a value can be written in UTF-8, unlike "\\ud83d" alone."""
    values = [value]
    for each in values:  # which grows, so that depth is no matter
        if isinstance(each, Mapping | list):
            values.extend(each.values() if isinstance(each, Mapping) else each)
        elif isinstance(each, str) and each.encode("utf-8", "ignore").decode() != each:
            return False
    return True


def _format(columns: Sequence[str], kind: Kind, path: str) -> tuple[str, ...]:
    """The first of a kind's alternatives whose columns all exist."""
    for alternative in (*FORMATS[kind], *COMPARISON_FORMATS.get(kind, ())):
        if all(column in columns for column in alternative):
            return alternative
    if kind == "references":
        raise InputError(
            f"{path} has the columns {', '.join(columns)}, but subtract_reference_score needs "
            "`prompt` and `completion`: name the right ones in data.columns, or set it to false."
        )
    wanted = ", or ".join(" and ".join(f"`{c}`" for c in names) for names in FORMATS[kind])
    raise InputError(
        f"{path} has the columns {', '.join(columns)}, but {kind} examples need {wanted}: "
        "name the right ones in data.columns."
    )


def _canonical(example: Example, kind: Kind) -> list[Example]:
    """The examples of a kind that one of a file stands for: one, or each pair of its responses."""
    if kind == "references":
        return [example]
    if kind == "text":
        return [_text_of_comparison(example) if "chosen" in example else example]
    if kind == "prompts":
        has_prompt = "prompt" in example or "text" in example
        return [example if has_prompt else _prompt_of_messages(example)]
    if kind == "unpaired" and "label" in example:
        return [with_columns(example, label=_label(example))]
    if kind == "unpaired":
        return labelled(example)
    ranking = ranking_of(example)
    if kind == "rankings":
        return [ranking]
    responses = ranking.pop("responses")
    return [
        with_columns(ranking, chosen=better, rejected=worse)
        for rank, better in enumerate(responses)
        for worse in responses[rank + 1 :]
    ]


def _text_of_comparison(example: Example) -> Example:
    """The preferred response as a completion, or the preferred conversation as a text."""
    chosen = example.pop("chosen")
    if "prompt" in example:
        return with_columns(example, completion=chosen)
    return with_columns(example, **{"text" if isinstance(chosen, str) else "messages": chosen})


def _prompt_of_messages(example: Example) -> Example:
    """The example with its messages as the prompt, without a last turn of the assistant."""
    turns = example["messages"] if "messages" in example else example["chosen"]
    if isinstance(turns, str):
        return example  # split later, by `split_conversations`
    is_answered = len(turns) > 1 and turns[-1]["role"] == "assistant"
    return with_columns(example, prompt=turns[:-1] if is_answered else turns)


def labelled(pair: Mapping[str, Any]) -> list[Example]:
    """A pair as a desirable and an undesirable example."""
    columns = {"prompt": "", **pair}
    responses = (columns.pop("chosen"), True), (columns.pop("rejected"), False)
    example = Example(columns, getattr(pair, "place", None))
    return [with_columns(example, completion=text, label=label) for text, label in responses]


def ranking_of(example: Mapping[str, Any]) -> Example:
    """A comparison as a ranking: its responses in one list, best first, of any number."""
    columns = {"prompt": "", **example, "margin": _margin(example.get("margin"))}
    responses = columns.get("responses") or [columns.pop("chosen"), columns.pop("rejected")]
    return Example({**columns, "responses": responses}, getattr(example, "place", None))


def _label(example: Mapping[str, Any]) -> Any:
    """The label, which is a text in a CSV file; True where there is none."""
    value = example.get("label", True)
    text = value.lower() if isinstance(value, str) else None
    return {"true": True, "false": False}.get(text, value) if text else value


def _margin(value: Any) -> float:
    """A margin, in a CSV file a text; 0 if there is none, NaN if it is no number."""
    try:
        return float(value or 0.0)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _fault(value: Any, column: str) -> str | None:
    """Why a value cannot be one of its column; None if it can."""
    if column in ("margin", "tools", "label"):  # the last two are read elsewhere
        is_number = column != "margin" or math.isfinite(_margin(value))
        return None if is_number else f"column 'margin' holds {_shown(value)}, no finite number"
    if column == "responses" and not isinstance(value, list):
        return f"column 'responses' {NO_LIST}: {_shown(value)}"
    for text in value if column == "responses" else [value]:
        is_text = isinstance(text, str) and column != "messages"
        if not is_text and (column == "text" or not are_messages(text)):
            return f"column {column!r} {_not_text(text, column)}"
    return None


def _not_text(value: Any, column: str) -> str:
    """Why a value is neither a text nor a list of messages."""
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    for content in (turn.get("content") for turn in turns if column != "text"):
        if content is None:
            return f"holds a message without content: {_shown(turns)}"
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") != "text":
                return f"holds a part {_shown(part)} of a message: only text can be read"
    if column == "messages":
        turn = '{"role": "user", "content": "text"}'
        return f"is no list of turns such as {turn}: {_shown(value)}"
    if value is None:
        return "holds nothing: give it a text"
    names = {int: "a number", float: "a number", bool: "a truth value", list: "a list"}
    return f"holds {names.get(type(value), 'an object')} ({_shown(value)}), not text"


def _shown(value: Any) -> str:
    """The beginning of a value, in a message."""
    return " ".join(repr(value).split())[:60]
