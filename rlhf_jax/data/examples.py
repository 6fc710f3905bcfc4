"""An example of a data set: its columns, and where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_jax.errors import InputError


class Example(dict[str, Any]):
    """The columns of an example by name.

    Attributes:
      place: where it stands, such as "line 3 of a.jsonl"; None if it comes from no file.
      source: the columns of the data that it was derived from, if these are others.
    """

    def __init__(
        self,
        columns: Mapping[str, Any] | Iterable[tuple[str, Any]],
        place: str | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(columns)
        self.place, self.source = place, source


def place_of(example: Mapping[str, Any], number: int) -> str:
    """Where an example stands; without a file, its number among the examples."""
    return getattr(example, "place", None) or f"example {number}"


def source_of(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of the data that an example was derived from."""
    return getattr(example, "source", None) or example


def with_columns(example: Mapping[str, Any], **columns: Any) -> Example:
    """An example derived from another one by other or further columns."""
    place = getattr(example, "place", None)
    return Example({**example, **columns}, place, source_of(example))


def fault_at(place: str, fault: str) -> InputError:
    """The error "PLACE FAULT" with a capital letter."""
    return InputError(f"{place[0].upper()}{place[1:]}{fault}")
