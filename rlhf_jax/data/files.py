"""Local data files: the files of a split, and tables from JSON, CSV and Parquet."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.formats import CANONICAL, Example, not_text
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

READERS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}
SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "eval", "evaluation", "test")
BROKEN_GZIP = (OSError, EOFError, zlib.error)


def looks_local(path: str) -> bool:
    """Whether a path that does not exist looks like a file rather than a name on the hub."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _reader(path) is not None


def _reader(path: str) -> str | None:
    """The name of the reader for a file, by its extension."""
    lower = path.lower()
    return next((READERS[end] for end in READERS if lower.endswith(end)), None)


def _base(split: str) -> str:
    """The split of a slice such as "train[:80%]"."""
    return re.split(r"[\[+]", split, maxsplit=1)[0]


def single_file(file: Path, split: str) -> Path:
    """The file, if the split is "train", the only one of a single file."""
    if _base(split) != "train":
        raise InputError(
            f"The split {split!r} of {file} does not exist: a single file is the split 'train' "
            "(give the evaluation file as data.eval_path)."
        )
    return file


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a folder that belong to a split; see `DataSettings.split`."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and _reader(f.name))
    if not files:
        raise InputError(
            f"The folder {folder} holds no data files: they end in {', '.join(READERS)}."
        )
    base = _base(split)
    named = [f for f in files if _first_word(f.name) in (*SPLIT_WORDS, base)]
    if not named and base == "train":
        return files
    of_split = [f for f in named if _first_word(f.name) == base]
    if not of_split:
        raise InputError(
            f"The folder {folder} has no file for the split {base!r}: there are "
            f"{', '.join(f.name for f in files)}."
        )
    return of_split


def _first_word(name: str) -> str:
    """The first word of a file name: "train" of train-00000-of-00002.parquet."""
    return re.split(r"[-_.]", name.lower(), maxsplit=1)[0]


def read_files(files: Sequence[Path], split: str, columns: Mapping[str, str]) -> datasets.Dataset:
    """The rows of local files of one format, through the `datasets` library."""
    import datasets

    readers = {_reader(file.name) for file in files}
    if None in readers:
        raise InputError(f"{files[0]} cannot be read: data files end in {', '.join(READERS)}.")
    if len(readers) > 1:
        raise InputError(
            f"The folder {files[0].parent} mixes formats ({', '.join(f.name for f in files)}): "
            "give one of them, or keep one format to a folder."
        )
    for file in files:
        _check_not_empty(file)
    reader = readers.pop()
    options = _csv_options(columns) if reader == "csv" else {}
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            reader, data_files={_base(split): [str(f) for f in files]}, split=split, **options
        )
    except Exception as error:  # its type depends on the reader and on the file
        raise InputError(_why_unreadable(files, error)) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _csv_options(columns: Mapping[str, str]) -> dict[str, Any]:
    """Options of the CSV reader that keep texts such as "042", "NA" and "" as they are."""
    converters: dict[str, Callable[[str], Any]] = {}
    for canonical in CANONICAL:
        name = columns.get(canonical, canonical)
        converters[name] = _number if canonical == "margin" else str
    return {"keep_default_na": False, "converters": converters}


def _number(cell: str) -> float:
    """A margin in a CSV file, 0 if empty; checked here because NaN would become None."""
    try:
        margin = float(cell or 0.0)
    except ValueError:
        margin = math.nan
    if not math.isfinite(margin):
        raise ValueError(f"the margin {cell!r} is no finite number")
    return margin


def _check_not_empty(file: Path) -> None:
    with _open(file) as stream:
        try:
            if stream.read(64).strip():
                return
        except BROKEN_GZIP as error:
            raise InputError(f"{file} cannot be unpacked: {error}.") from error
    raise InputError(f"{file} is empty: give a file with at least one row.")


def _open(file: Path) -> Any:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else open(file, "rb")


def _why_unreadable(files: Sequence[Path], error: Exception) -> str:
    """The error message for files that could not be read, with the line number if known."""
    for file in files:
        try:
            fault = _fault(file)
        except BROKEN_GZIP as gzip_error:
            fault = f"{file} cannot be unpacked: {gzip_error}."
        if fault is not None:
            return fault
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
    return f"{', '.join(map(str, files))} cannot be read: {reason}."


def _fault(file: Path) -> str | None:
    """The error message for an invalid JSON file; None if it is valid or of another format."""
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _fault_in_json_lines(file)
    if not name.endswith(".json"):
        return None
    try:
        with _open(file) as stream:
            json.load(stream)
    except ValueError as error:
        return f"{file} is no JSON: {error}."
    return None


def _fault_in_json_lines(file: Path) -> str | None:
    """The error message for the first line that is not a JSON object or changes a column's type."""
    first: Example = {}
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            return f"Line {number} of {file} is no JSON: {error}."
        if not isinstance(row, dict):
            return f'Line {number} of {file} is no JSON object: write {{"column": value, ...}}.'
        for column, value in row.items():
            before = first.setdefault(column, value)
            if isinstance(before, str) and not isinstance(value, str | None):
                return f"Row {number} of {file}: {not_text(column, value)}."
    return None


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line
