"""Rows whose prompt is inside another text: whole conversations, and prompts with a set ending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.encoding import warn
from rlhf_jax.data.formats import Kind, Row
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from rlhf_jax.data.datasets import Settings

RESPONSES = ("completion", "chosen", "rejected")


def split_conversations(
    rows: Sequence[Row], kind: Kind, settings: Settings, path: str, *, quiet: bool = False
) -> list[Row]:
    """The rows with the prompts that `split_at` and `prompt_suffix` of the settings find in them.

    Args:
      rows: under canonical names.
      kind: "text", "pairs", "rankings" or "prompts".
      settings: the section `data`.
      path: where the rows are from, for what is said of them.
      quiet: leaves out the warning, for who reads the same rows again.

    Raises:
      InputError: no row is left, or a row has messages where a text is to be split.
    """
    parted = list(rows)
    if settings.split_at is not None:
        found = [_split(row, number, kind, settings.split_at) for number, row in enumerate(rows, 1)]
        parted = [row for row in found if row is not None]
        what = "prompts" if kind == "prompts" else {"text": "texts"}.get(kind, kind)
        share = " in one of their texts, or not the same before it" if _is_compared(kind) else ""
        if not quiet:
            warn(
                len(rows) - len(parted),
                len(rows),
                f"{what} of {path} were dropped because they do not have data.split_at "
                f"({settings.split_at!r}){share}.",
            )
        if rows and not parted:
            raise InputError(
                f"No row of {path} can be split: none has data.split_at ({settings.split_at!r})"
                f"{' in all of its texts, and the same before it' if share else ''}."
            )
    if settings.prompt_suffix is not None:
        parted = [_ended(row, settings.prompt_suffix.strip()) for row in parted]
    return parted


def _is_compared(kind: Kind) -> bool:
    return kind in ("pairs", "rankings")


def _split(row: Row, number: int, kind: Kind, mark: str) -> Row | None:
    """The row with a prompt of its own; None if it cannot be split where it has to be."""
    if row.get("prompt"):
        return row
    if kind == "rankings":
        parts = [_cut(text, number, mark) for text in row["responses"]]
        shared = _shared_prompt(parts)
        return shared and {**row, "prompt": shared, "responses": [tail for _, tail in parts]}
    if kind == "pairs":
        parts = [_cut(row[name], number, mark) for name in ("chosen", "rejected")]
        shared = _shared_prompt(parts)
        return shared and {**row, "prompt": shared, "chosen": parts[0][1], "rejected": parts[1][1]}
    return _split_single(row, number, mark)


def _split_single(row: Row, number: int, mark: str) -> Row | None:
    """A whole text as prompt and completion; a chosen conversation as prompt and chosen response.

    So the columns of a file of whole conversations mean what they do where the prompt is apart.
    """
    source = next(name for name in ("text", "messages", "chosen", "prompt") if name in row)
    prompt, tail = _cut(row[source], number, mark)
    if not prompt:
        return None
    if source != "chosen":
        rest = {name: value for name, value in row.items() if name != source}
        return {**rest, "prompt": prompt, "completion": tail}
    other = row.get("rejected")
    if isinstance(other, str) and other.startswith(prompt):
        row = {**row, "rejected": other[len(prompt) :]}
    return {**row, "prompt": prompt, "chosen": tail}


def _cut(text: Any, number: int, mark: str) -> tuple[str, str]:
    """(all up to and with the last mark, what follows it); the first is empty without a mark."""
    if not isinstance(text, str):
        raise InputError(
            f"Row {number} holds messages, which have their turns already: leave out data.split_at "
            f"({mark!r}), which splits texts."
        )
    head, found, tail = text.rpartition(mark)
    return head + found, tail


def _shared_prompt(parts: Sequence[tuple[str, str]]) -> Any:
    """The first part, if all have the same; None if not, or if it is empty."""
    prompts = {prompt for prompt, _ in parts}
    return (prompts.pop() or None) if len(prompts) == 1 else None


def _ended(row: Row, suffix: str) -> Row:
    """The row with a prompt that ends with the suffix, if that is between prompt and responses.

    White space behind the suffix goes over to the responses, and a suffix that the responses begin
    with to the prompt, on a line of its own.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return row
    stripped = prompt.rstrip()
    if stripped.endswith(suffix):
        space = prompt[len(stripped) :]
        return _responses(row, lambda text: space + text) | {"prompt": stripped} if space else row
    texts = _texts(row)
    if texts and all(isinstance(text, str) and text.startswith(suffix) for text in texts):
        line = f"{stripped}\n{suffix}" if stripped else suffix
        return _responses(row, lambda text: text[len(suffix) :]) | {"prompt": line}
    return row


def _texts(row: Row) -> list[Any]:
    """The responses of a row, under whatever name."""
    return [row[name] for name in RESPONSES if name in row] + list(row.get("responses", ()))


def _responses(row: Row, change: Any) -> Row:
    """The row with all its responses changed; what is no text stays as it is."""

    def changed(text):
        return change(text) if isinstance(text, str) else text

    found = {name: changed(row[name]) for name in RESPONSES if name in row}
    if "responses" in row:
        found["responses"] = [changed(text) for text in row["responses"]]
    return {**row, **found}
