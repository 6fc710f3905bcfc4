"""Rows of text from the embedded corpus, from local files or from the hub, under canonical names.

Four kinds of rows are understood. `text`: `prompt` + `completion`, or `messages`, or `text`.
`pairs`: an optional `prompt` with `chosen` and `rejected` (and perhaps a `margin`), or with
`responses`, best first, of which every two make a pair. `rankings`: the same columns, with a pair
as a ranking of two. `prompts`: `prompt` or `text`; all other columns are kept for reward functions.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_jax.data import builtin
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
Kind = Literal["text", "pairs", "rankings", "prompts"]

BUILTIN = "builtin"
READERS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}
# The first alternative whose columns are all there is the one that is read.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text": (("prompt", "completion"), ("messages",), ("text",)),
    "pairs": (("chosen", "rejected"), ("responses",)),
    "rankings": (("responses",), ("chosen", "rejected")),
    "prompts": (("prompt",), ("text",)),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "text": (),
    "pairs": ("prompt", "margin"),
    "rankings": ("prompt", "margin"),
    "prompts": (),
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
SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "eval", "evaluation", "test")
MOST_HELD_OUT = 512
BROKEN_GZIP = (OSError, EOFError, zlib.error)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `data` of the configuration.

    Attributes:
      path: "builtin" for the embedded corpus; a file .jsonl, .json, .csv (each also with .gz) or
        .parquet; a folder of such files; or the name of a data set on the hub. An empty cell of a
        CSV file is the empty text.
      name: configuration of a data set on the hub.
      split: training rows. A file is the split "train"; in a folder, files called after a split
        (train.jsonl, train-00000.parquet) are that split, or else all are "train". The library's
        slices ("train[:80%]") are understood.
      eval_path: where the evaluation rows are, if not in `path`.
      eval_split: their split; "train" of a file, "validation" of a folder or a hub data set.
      eval_rows: evaluation rows. With neither `eval_path` nor `eval_split`, exactly so many are
        held out from the end of a shuffle by `seed`; otherwise the first of the evaluation split,
        at most so many. None means 512, or a tenth of the rows where that is fewer. 0 means none.
      max_rows: training rows at most, the first of the same shuffle.
      columns: canonical column name -> name in the file.
      seed: of the embedded corpus, of the hold-out and of `prompt_tokens`.
      builtin_rows: training rows of the embedded corpus.
      max_length: tokens of a text, prompt and completion together, EOS included.
      max_prompt_length: tokens of a prompt; longer ones lose their left end.
      max_response_length: tokens of a completion or judged response, EOS included; longer ones
        lose their right end.
      completion_only: learn only the completion of a prompt (the last turn of messages), not the
        prompt as well.
      packing: put several short texts into one row.
      length_buckets: how many widths the batches may have, 1 to 4; each is compiled once. With more
        than one, padding that no row of a batch needs is cut off.
      prompt_tokens: for prompts that are whole texts: keep the first n tokens, n drawn uniformly
        from this closed range by (seed, row).

    Raises:
      InputError: naming the setting that cannot be, and what is allowed.
    """

    path: str = BUILTIN
    name: str | None = None
    split: str = "train"
    eval_path: str | None = None
    eval_split: str | None = None
    eval_rows: int | None = None
    max_rows: int | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    builtin_rows: int = 4096
    max_length: int = 256
    max_prompt_length: int = 128
    max_response_length: int = 128
    completion_only: bool = True
    packing: bool = True
    length_buckets: int = 1
    prompt_tokens: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for key in ("builtin_rows", "max_prompt_length"):
            _at_least(1, key, getattr(self, key))
        # Two tokens are the shortest text of which one is predicted, one and EOS a response.
        for key in ("max_length", "max_response_length"):
            _at_least(2, key, getattr(self, key))
        _at_least(0, "seed", self.seed)
        if not 1 <= self.length_buckets <= 4:
            raise InputError(
                f"data.length_buckets is {self.length_buckets}: set it to a number from 1 to 4."
            )
        if self.max_rows is not None:
            _at_least(1, "max_rows", self.max_rows)
        if self.eval_rows is not None:
            _at_least(0, "eval_rows", self.eval_rows)
        if not self.path.strip() or not self.split.strip():
            raise InputError('data.path and data.split need a value: "builtin" and "train", say.')
        self._check_columns()
        self._check_prompt_tokens()
        self._check_builtin()

    def _check_columns(self) -> None:
        for canonical in self.columns:
            if canonical not in CANONICAL:
                raise InputError(
                    f"data.columns maps {canonical!r}, which is no column that is read: the left "
                    f"side is one of {', '.join(CANONICAL)}, the right side a name in the file."
                )

    def _check_prompt_tokens(self) -> None:
        if self.prompt_tokens is None:
            return
        if len(self.prompt_tokens) != 2:
            raise InputError(f"data.prompt_tokens is {self.prompt_tokens}: give (low, high).")
        low, high = self.prompt_tokens
        if not 1 <= low <= high <= self.max_prompt_length:
            raise InputError(
                f"data.prompt_tokens is ({low}, {high}): give (low, high) with 1 <= low <= high <= "
                f"data.max_prompt_length ({self.max_prompt_length})."
            )

    def _check_builtin(self) -> None:
        if self.path != BUILTIN:
            return
        if self.split != "train" or self.name is not None:
            raise InputError(
                "data.split and data.name choose among a file's or a hub data set's rows, which "
                'the path "builtin" does not have: leave them out.'
            )
        if self.eval_split is not None and self.eval_path is None:
            raise InputError(
                "data.eval_split needs data.eval_path here: the embedded corpus makes its own "
                "evaluation rows (data.eval_rows)."
            )


def _at_least(lowest: int, key: str, value: int) -> None:
    if value < lowest:
        raise InputError(f"data.{key} is {value}: set it to {lowest} or more.")


def load_rows(settings: Settings, kind: Kind) -> tuple[list[Row], list[Row]]:
    """The training and the evaluation rows, with canonical column names.

    Args:
      settings: where they are and how many are wanted.
      kind: "text", "pairs", "rankings" or "prompts".

    Returns:
      (train_rows, eval_rows), lists of dicts. "text" rows have `prompt` and `completion`, or
      `messages`, or `text`. "pairs" rows have `chosen`, `rejected`, `margin` (0.0 where the file
      has none) and `prompt` ("" likewise). "rankings" rows have `responses` in their stead, a list
      of any length. "prompts" rows have `prompt` or `text` and every other column of the file.

    Raises:
      InputError: in one sentence that names the file, if it is missing, empty or unreadable, has
        not the columns, or has a row without text.
    """
    if kind not in FORMATS:
        raise InputError(f"The kind of rows is {kind!r}: it is one of {', '.join(FORMATS)}.")
    if settings.path == BUILTIN:
        train = _builtin_rows(settings, kind, settings.builtin_rows, "train")[: settings.max_rows]
        if settings.eval_path is not None:
            return train, _evaluation_rows(settings, kind)
        wanted = MOST_HELD_OUT if settings.eval_rows is None else settings.eval_rows
        return train, _builtin_rows(settings, kind, wanted, "eval")
    table = _read(settings.path, settings.split, settings)
    order = np.random.default_rng(settings.seed).permutation(len(table))
    if settings.eval_path is None and settings.eval_split is None:
        held_out = _held_out(settings, len(table))
        cut = len(table) - held_out
        evaluation = _rows(table, sorted(order[cut:].tolist()), kind, settings.path)
        order = order[:cut]
    else:
        evaluation = _evaluation_rows(settings, kind)
    chosen = sorted(order[: settings.max_rows].tolist())
    return _rows(table, chosen, kind, settings.path), evaluation


def _builtin_rows(settings: Settings, kind: Kind, rows: int, split: builtin.Split) -> list[Row]:
    """Rows of the embedded corpus; the two splits share no prompt."""
    if kind == "text":
        return builtin.texts(settings.seed, rows, split)
    if kind == "pairs":
        return builtin.pairs(settings.seed, rows, split)
    if kind == "rankings":
        return [_ranking(row) for row in builtin.pairs(settings.seed, rows, split)]
    return builtin.prompts(settings.seed, rows, split)


def _held_out(settings: Settings, rows: int) -> int:
    """How many rows to hold out of so many."""
    if settings.eval_rows is None:
        return min(MOST_HELD_OUT, rows // 10)
    if settings.eval_rows >= rows:
        raise InputError(
            f"data.eval_rows holds out {settings.eval_rows} of the {rows} rows of {settings.path} "
            "and leaves none to train on: set it lower, or give data.eval_path."
        )
    return settings.eval_rows


def _evaluation_rows(settings: Settings, kind: Kind) -> list[Row]:
    """The first rows of the evaluation split that the settings name."""
    path = settings.eval_path or settings.path
    if path == BUILTIN:
        rows = MOST_HELD_OUT if settings.eval_rows is None else settings.eval_rows
        return _builtin_rows(settings, kind, rows, "eval")
    if settings.eval_rows == 0:
        return []
    split = settings.eval_split or ("train" if os.path.isfile(path) else "validation")
    table = _read(path, split, settings)
    most = MOST_HELD_OUT if settings.eval_rows is None else settings.eval_rows
    return _rows(table, list(range(min(most, len(table)))), kind, path)


# --- reading -------------------------------------------------------------------------------------


def _read(path: str, split: str, settings: Settings) -> datasets.Dataset:
    """The table behind a path, renamed: a file, a folder or a data set on the hub; never empty."""
    local = os.path.expanduser(path)
    if os.path.isdir(local):
        table = _read_files(_files_of_split(Path(local), split), split, settings.columns)
    elif os.path.isfile(local):
        table = _read_files([_single_file(Path(local), split)], split, settings.columns)
    elif _looks_local(path):
        raise InputError(
            f"There is no file or folder {path}: give one that exists, the name of a data set on "
            f'the hub, or "{BUILTIN}".'
        )
    else:
        table = _read_hub(path, settings.name, split)
    if len(table) == 0:
        raise InputError(f"{path} has no rows in the split {split!r}: give one that has some.")
    return _rename(table, settings.columns, path)


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant for a file, and not for the hub."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _reader(path) is not None


def _reader(path: str) -> str | None:
    """The name of the reader for a file, by its extension."""
    lower = path.lower()
    return next((READERS[end] for end in READERS if lower.endswith(end)), None)


def _base(split: str) -> str:
    """The split of a slice such as "train[:80%]"."""
    return re.split(r"[\[+]", split, maxsplit=1)[0]


def _single_file(file: Path, split: str) -> Path:
    if _base(split) != "train":
        raise InputError(
            f"The split {split!r} of {file} does not exist: a single file is the split 'train' "
            "(give the evaluation file as data.eval_path)."
        )
    return file


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a folder that make up a split; see `Settings.split`."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and _reader(f.name))
    if not files:
        raise InputError(
            f"The folder {folder} holds no data files: they end in {', '.join(READERS)}."
        )
    base = _base(split)
    named = [f for f in files if _word(f.name) in SPLIT_WORDS or _word(f.name) == base]
    if not named and base == "train":
        return files
    of_split = [f for f in named if _word(f.name) == base]
    if not of_split:
        raise InputError(
            f"The folder {folder} has no file for the split {base!r}: there are "
            f"{', '.join(f.name for f in files)}."
        )
    return of_split


def _word(name: str) -> str:
    """What a file name begins with: "train" of train-00000-of-00002.parquet."""
    return re.split(r"[-_.]", name.lower(), maxsplit=1)[0]


def _read_files(files: Sequence[Path], split: str, columns: Mapping[str, str]) -> datasets.Dataset:
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
    except Exception as error:  # what is raised depends on the reader and on the file
        raise InputError(_why_unreadable(files, error)) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _csv_options(columns: Mapping[str, str]) -> dict[str, Any]:
    """Keeps the CSV reader from guessing: texts such as "042", "NA" and "" stay as written."""
    converters: dict[str, Callable[[str], Any]] = {}
    for canonical in CANONICAL:
        name = columns.get(canonical, canonical)
        converters[name] = _number if canonical == "margin" else str
    return {"keep_default_na": False, "converters": converters}


def _number(cell: str) -> float:
    """A margin in a CSV file, 0 where there is none; checked here, since NaN would become None."""
    try:
        margin = float(cell or 0.0)
    except ValueError:
        margin = math.nan
    if not math.isfinite(margin):
        raise ValueError(f"the margin {cell!r} is no finite number")
    return margin


def _check_not_empty(file: Path) -> None:
    """Raises if a file holds nothing: the readers' own errors say nothing of that."""
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
    """One sentence for files that could not be read, with the line where it can be told."""
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
    """What is wrong with a file of JSON; None if nothing is, or if it is of another format."""
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
    """The first line that is no JSON object, or whose values are of another type than before."""
    first: Row = {}
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
                return _not_text(str(file), number, column, value)
    return None


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line


def _read_hub(path: str, name: str | None, split: str) -> datasets.Dataset:
    """A split of a data set on the hub."""
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise InputError(
            f"The data set {path} (split {split!r}) is neither a local file nor to be had from the "
            f"hub: check its name and split, and if this machine is offline give a local file "
            f"({reason})."
        ) from error


# --- columns and rows ----------------------------------------------------------------------------


def _rename(table: datasets.Dataset, columns: Mapping[str, str], path: str) -> datasets.Dataset:
    """The table with the mapped columns under their canonical names."""
    for canonical, column in columns.items():
        if column == canonical:
            continue
        if column not in table.column_names:
            raise InputError(
                f"data.columns maps {canonical!r} to {column!r}, but {path} has the columns "
                f"{', '.join(table.column_names)}."
            )
        if canonical in table.column_names:
            table = table.remove_columns(canonical)
        table = table.rename_column(column, canonical)
    return table


def _rows(table: datasets.Dataset, indices: list[int], kind: Kind, path: str) -> list[Row]:
    """The rows at `indices`, checked; errors count rows from 1, as in the file."""
    found = _format(table.column_names, kind, path)
    kept = [c for c in (*found, *OPTIONAL[kind]) if c in table.column_names]
    if kind != "prompts":
        table = table.select_columns(kept)
    rows = []
    for index, row in zip(indices, table.select(indices), strict=True):
        for column in kept:
            _check_value(row[column], column, index + 1, path)
        if kind == "pairs":
            _check_two(row, index + 1, path)
        rows.extend(_canonical(dict(row), kind))
    return rows


def _format(columns: Sequence[str], kind: Kind, path: str) -> tuple[str, ...]:
    """The first of a kind's alternatives whose columns are all there."""
    for alternative in FORMATS[kind]:
        if all(column in columns for column in alternative):
            return alternative
    wanted = ", or ".join(" and ".join(f"`{c}`" for c in names) for names in FORMATS[kind])
    raise InputError(
        f"{path} has the columns {', '.join(columns)}, but {kind} rows need {wanted}: name the "
        "right ones in data.columns."
    )


def _canonical(row: Row, kind: Kind) -> list[Row]:
    """The rows that one row of the file stands for: as many as its responses have pairs."""
    if kind == "rankings":
        return [_ranking(row)]
    if kind != "pairs":
        return [row]
    common = {"prompt": row.get("prompt", ""), "margin": float(row.get("margin") or 0.0)}
    if "responses" not in row:
        return [{**common, "chosen": row["chosen"], "rejected": row["rejected"]}]
    ranked = row["responses"]
    return [
        {**common, "chosen": better, "rejected": worse}
        for place, better in enumerate(ranked)
        for worse in ranked[place + 1 :]
    ]


def _ranking(row: Row) -> Row:
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
        if not _are_messages(value):
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
            if not isinstance(response, str):
                raise InputError(_not_text(path, number, column, response))
    elif not isinstance(value, str):
        raise InputError(_not_text(path, number, column, value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def _not_text(path: str, number: int, column: str, value: Any) -> str:
    """The sentence for a value that should have been text."""
    if value is None:
        return f"Row {number} of {path}: column {column!r} holds nothing: give it a text."
    what = {int: "a number", float: "a number", bool: "a truth value", list: "a list"}
    return (
        f"Row {number} of {path}: column {column!r} holds {what.get(type(value), 'an object')} "
        f"({str(value)[:40]}), not text."
    )
