"""Tables of examples, read as they are written: JSON as JSON, CSV as text, the rest as typed."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.data.examples import Example, fault_at
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

ENDINGS = ".jsonl, .json, .csv (each also with .gz) or .parquet"
SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "eval", "evaluation", "test")
# Files of a folder that `save_to_disk` has written, of one split and of several.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"


class Table(NamedTuple):
    """A split of a data set.

    Attributes:
      columns: the names of all columns.
      size: number of examples.
      read: indices -> the examples, with the columns that are used as far as they have them.
      has_one_schema: whether objects in a column have all keys of all examples, filled with null.
    """

    columns: Sequence[str]
    size: int
    read: Callable[[Sequence[int]], list[Example]]
    has_one_schema: bool = False


def read_table(path: str, name: str | None, split: str, columns: set[str] | None) -> Table:
    """A split of a file, a folder or a data set on the hub.

    Args:
      path, name, split: see `DataSettings`.
      columns: the columns that are used; None for all.

    Raises:
      InputError: it cannot be read; with the file, and its line if known.
    """
    local = Path(os.path.expanduser(path))
    if not os.path.exists(local):
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or _extension(path):
            raise InputError(
                f"There is no file or folder {path}: give one that exists, the name of a data set "
                'on the hub, or "builtin".'
            )
        return _of_library(_read_hub(path, name, split), path, columns)
    base = re.split(r"[\[+]", split, maxsplit=1)[0]  # of a slice such as "train[:80%]"
    if (local / SAVED).exists() or (local / SAVED_SPLITS).exists():
        table = _of_library(_read_saved(local, base), path, columns)
    elif local.is_dir():
        table = _read_files(_files_of_split(local, base), columns)
    elif base != "train":
        raise InputError(
            f"The split {split!r} of {path} does not exist: a single file is the split 'train' "
            "(give the evaluation file as data.eval_path)."
        )
    else:
        table = _read_files([local], columns)
    return table if split == base else _slice(table, split, base)


def is_one_split(path: str) -> bool:
    """Whether a path is a file, or a folder with one saved split; it then is the split "train"."""
    local = Path(os.path.expanduser(path))
    return local.is_file() or (local / SAVED).exists()


def _slice(table: Table, split: str, base: str) -> Table:
    """The part of the table that a split such as "train[:80%]" stands for."""
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({base: table.size})
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"The split {split!r} does not fit {table.size} examples ({_reason(error)}): give one "
            "such as train[:80%]."
        ) from error
    kept = [index for part in parts for index in range(part.from_ or 0, part.to)]
    return table._replace(size=len(kept), read=lambda ids: table.read([kept[i] for i in ids]))


def _extension(name: str) -> str | None:
    """The extension of a data file without .gz; None if there is no reader for it."""
    end = re.search(r"(\.jsonl|\.json|\.csv)(\.gz)?$|\.parquet$", name.lower())
    return end and (end[1] or end[0])


def _files_of_split(folder: Path, base: str) -> list[Path]:
    """The files of a folder that belong to a split; see `DataSettings.split`."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and _extension(f.name))
    files = [f for f in files if f.name != "dataset_info.json"]  # of the `datasets` library
    if not files:
        raise InputError(f"The folder {folder} holds no data files: they end in {ENDINGS}.")
    # The first word: "train" of train-00000-of-00002.parquet.
    words = {file: re.split(r"[-_.]", file.name.lower(), maxsplit=1)[0] for file in files}
    if base == "train" and not any(word in SPLIT_WORDS for word in words.values()):
        return files
    of_split = [file for file in files if words[file] == base]
    if not of_split:
        raise InputError(
            f"The folder {folder} has no file for the split {base!r}: there are "
            f"{', '.join(f.name for f in files)}."
        )
    return of_split


def _read_files(files: Sequence[Path], columns: set[str] | None) -> Table:
    """The examples of local files of one format."""
    extensions = {_extension(file.name) for file in files}
    if len(extensions) > 1:
        raise InputError(
            f"The folder {files[0].parent} mixes formats ({', '.join(f.name for f in files)}): "
            "give one of them, or keep one format to a folder."
        )
    reader = READERS.get(extensions.pop() or "")
    if reader is None:
        raise InputError(f"{files[0]} cannot be read: data files end in {ENDINGS}.")
    names: dict[str, None] = {}
    examples: list[Example] = []
    is_parquet = reader is _read_parquet
    for file in files:
        count = len(examples)
        if is_parquet:
            names.update(dict.fromkeys(_parquet_columns(file)))
        for example in _read_parquet(file, columns) if is_parquet else reader(file):
            names.update(dict.fromkeys(example))
            for name in example.keys() - columns if columns is not None else ():
                del example[name]
            examples.append(example)
        if len(examples) == count:
            raise InputError(f"{file} is empty: give a file with at least one example.")

    def read(indices: Sequence[int]) -> list[Example]:
        return [examples[i] for i in indices]

    return Table(list(names), len(examples), read, has_one_schema=is_parquet)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file in UTF-8, numbered from 1."""
    number, is_packed = 0, file.name.lower().endswith(".gz")
    try:
        with gzip.open(file, "rb") if is_packed else open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"Line {number} of {file} is not in UTF-8: it has the byte 0x{byte:02x}; save the file "
            "in UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        verb = "unpacked" if is_packed else "read"
        raise InputError(f"{file} cannot be {verb}: {error}.") from error


def _read_json_lines(file: Path) -> Iterator[Example]:
    for number, line in _lines(file):
        if line.strip():
            place = f"line {number} of {file}"
            try:
                record = json.loads(line.rstrip())
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                column = f" at column {error.colno}" if hasattr(error, "colno") else ""
                shown = repr(line.strip()[:60])
                raise fault_at(place, f" is no JSON ({reason}{column}): {shown}.") from error
            yield _json_object(record, place)


def _json_object(value: Any, place: str) -> Example:
    if not isinstance(value, dict):
        shown = repr(value)[:60]
        raise fault_at(place, f' is no JSON object such as {{"column": value, ...}}: {shown}.')
    return Example(value, place)


def _read_json(file: Path) -> Iterator[Example]:
    """The objects of a list, the one JSON document of the file; or of JSON lines."""
    text = "".join(line for _, line in _lines(file))
    try:
        document = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", None) == "Extra data":
            yield from _read_json_lines(file)
            return
        raise InputError(f"{file} is no JSON: {error}.") from error
    for number, record in enumerate(document if isinstance(document, list) else [document], 1):
        yield _json_object(record, f"row {number} of {file}")


def _read_csv(file: Path) -> Iterator[Example]:
    """The records below the header; all cells are texts. Blank lines are skipped.

    Further columns of one name are called NAME.1, NAME.2, ...
    """
    limit = csv.field_size_limit(sys.maxsize)  # by default 131,072 characters
    records = csv.reader((line for _, line in _lines(file)), strict=True)
    header: list[str] = []
    number = 1
    try:
        for cells in records:
            place, number = f"line {number} of {file}", records.line_num + 1
            if header and cells and len(cells) != len(header):
                raise fault_at(
                    place,
                    f" has {len(cells)} cells, but the header has {len(header)}: put texts with "
                    "commas or line breaks in double quotes.",
                )
            if header and cells:
                yield Example(zip(header, cells, strict=True), place)
            header = header or [
                name if name not in cells[:n] else f"{name}.{cells[:n].count(name)}"
                for n, name in enumerate(cells)
            ]
    except csv.Error as error:
        raise InputError(f"Line {number} of {file} is no CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_columns(file: Path) -> list[str]:
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(file).names)
    except Exception as error:  # its type depends on the fault
        raise InputError(f"{file} cannot be read: {_reason(error)}.") from error


def _read_parquet(file: Path, columns: set[str] | None = None) -> Iterator[Example]:
    import pyarrow.parquet

    used = [name for name in _parquet_columns(file) if columns is None or name in columns]
    try:
        records = pyarrow.parquet.read_table(file, columns=used).to_pylist()
        records = records if used else [{}] * pyarrow.parquet.read_metadata(file).num_rows
    except Exception as error:  # its type depends on the fault
        raise InputError(f"{file} cannot be read: {_reason(error)}.") from error
    for number, record in enumerate(records, 1):
        yield Example(record, f"row {number} of {file}")


READERS: dict[str, Callable[[Path], Iterator[Example]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# --- the `datasets` library ----------------------------------------------------------------------


def _of_library(dataset: datasets.Dataset, path: str, columns: set[str] | None) -> Table:
    names = dataset.column_names
    used = dataset.select_columns([c for c in names if columns is None or c in columns])

    def read(indices: Sequence[int]) -> list[Example]:
        records = zip(indices, used.select(indices), strict=True)
        return [Example(record, f"row {index + 1} of {path}") for index, record in records]

    return Table(names, len(dataset), read, has_one_schema=True)


def _read_saved(folder: Path, base: str) -> datasets.Dataset:
    """A split of a folder written by `save_to_disk`."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # its type depends on the fault
        raise InputError(f"{folder} cannot be read: {_reason(error)}.") from error
    splits = saved if isinstance(saved, dict) else {"train": saved, str(saved.split): saved}
    if base not in splits:
        raise InputError(
            f"The folder {folder} has no split {base!r}: there are {', '.join(splits)}."
        )
    return splits[base]


def _read_hub(path: str, name: str | None, split: str) -> datasets.Dataset:
    """A split of a data set on the hub."""
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except Exception as error:  # its type depends on the fault
        cache = str(datasets.config.HF_DATASETS_CACHE)
        try:
            os.makedirs(cache, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()
        except OSError as fault:
            raise InputError(
                f"The data set {path} cannot be stored in {cache} ({fault.strerror}): set HF_HOME "
                "to a folder that can be written."
            ) from error
        if not isinstance(error, OSError | ValueError):
            raise InputError(f"The data set {path} cannot be read: {_reason(error)}.") from error
        raise InputError(
            f"The data set {path} (split {split!r}) is neither a local file nor available on the "
            f"hub: check its name and split, and if this machine is offline give a local file "
            f"({_reason(error)})."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of the message of an error, or of the one that caused it."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
