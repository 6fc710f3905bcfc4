"""Examples of text from the embedded corpus, from local files or from the hub.

The kinds of examples and their columns: `text`: `prompt` + `completion`, or `messages`, or `text`.
`pairs`: an optional `prompt` with `chosen` and `rejected` (and an optional `margin`), or with
`responses`, best first, of which every two make a pair. `rankings`: the same columns; a pair is a
ranking of two. `prompts`: `prompt` or `text`; all other columns are kept for reward functions.
`references`: the same, but each example has a `prompt` and a `completion`, the reference response.
All columns but `text` may hold messages instead of a text. A file of comparisons is also read as
`text` (the preferred responses) and as `prompts`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.data import builtin
from rlhf_jax.data.conversations import split_conversations
from rlhf_jax.data.files import files_of_split, looks_local, read_files, single_file
from rlhf_jax.data.formats import FORMATS, Example, Kind, examples_of, ranking_of
from rlhf_jax.data.settings import BUILTIN, DataSettings
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

MAX_HELD_OUT = 512


def load_examples(
    settings: DataSettings, kind: Kind, *, quiet: bool = False
) -> tuple[list[Example], list[Example]]:
    """The training and the evaluation examples, with canonical column names.

    Args:
      settings: the source and the number of examples.
      kind: "text", "pairs", "rankings", "prompts" or "references".
      quiet: whether to skip the warning of dropped examples, for a second pass over the same data.

    Returns:
      (train, evaluation), lists of dicts. "text" examples have `prompt` and `completion`, or
      `messages`, or `text`. "pairs" have `chosen`, `rejected`, `margin` (0.0 if the file has none)
      and `prompt` ("" if it has none). "rankings" have `responses` instead of `chosen` and
      `rejected`, a list of any length. "prompts" have `prompt` or `text` and every other column of
      the file, "references" have `prompt`, `completion` and every other column. Each text except
      `text` may be messages instead.

    Raises:
      InputError: naming the file, if it is missing, empty or unreadable, lacks the columns, or has
        a row without text.
    """
    if kind not in FORMATS:
        raise InputError(f"The kind of examples is {kind!r}: it is one of {', '.join(FORMATS)}.")
    train, evaluation = _load(settings, kind)
    eval_path = settings.eval_path or settings.path
    train = split_conversations(train, kind, settings, settings.path, quiet=quiet)
    evaluation = split_conversations(evaluation, kind, settings, eval_path, quiet=quiet)
    if kind == "prompts":
        _check_prompts(train, settings.path)
        _check_prompts(evaluation, eval_path)
    return train, evaluation


def _check_prompts(examples: list[Example], path: str) -> None:
    """Raises if an example has a full conversation that was not split into prompt and response."""
    if any("prompt" not in example and "text" not in example for example in examples):
        raise InputError(
            f"Of {path} the column `chosen` is read for its prompts, but holds texts: set "
            'data.split_at to the text before the responses (for example "\\n\\nAssistant:"), or '
            "name the column of prompts in data.columns."
        )


def _load(settings: DataSettings, kind: Kind) -> tuple[list[Example], list[Example]]:
    """(train, evaluation), before conversations are split."""
    if settings.path == BUILTIN:
        train = _builtin(settings, kind, settings.builtin_rows, "train")[: settings.max_rows]
        if settings.eval_path is not None:
            return train, _evaluation(settings, kind)
        return train, _builtin(settings, kind, _max_evaluation(settings), "eval")
    table = _read(settings.path, settings.split, settings)
    order = np.random.default_rng(settings.seed).permutation(len(table))
    if settings.eval_path is None and settings.eval_split is None:
        held_out = _held_out(settings, len(table))
        cut = len(table) - held_out
        evaluation = examples_of(table, sorted(order[cut:].tolist()), kind, settings.path)
        order = order[:cut]
    else:
        evaluation = _evaluation(settings, kind)
    selected = sorted(order[: settings.max_rows].tolist())
    return examples_of(table, selected, kind, settings.path), evaluation


def _builtin(settings: DataSettings, kind: Kind, count: int, split: builtin.Split) -> list[Example]:
    """Examples of the embedded corpus; the two splits share no prompt."""
    if kind in ("text", "references"):
        return builtin.texts(settings.seed, count, split)
    if kind == "pairs":
        return builtin.pairs(settings.seed, count, split)
    if kind == "rankings":
        return [ranking_of(pair) for pair in builtin.pairs(settings.seed, count, split)]
    return builtin.prompts(settings.seed, count, split)


def _held_out(settings: DataSettings, total: int) -> int:
    """The number of examples to hold out."""
    if settings.eval_rows is None:
        return min(MAX_HELD_OUT, total // 10)
    if settings.eval_rows >= total:
        raise InputError(
            f"data.eval_rows holds out {settings.eval_rows} of the {total} rows of {settings.path} "
            "and leaves none to train on: set it lower, or give data.eval_path."
        )
    return settings.eval_rows


def _max_evaluation(settings: DataSettings) -> int:
    return MAX_HELD_OUT if settings.eval_rows is None else settings.eval_rows


def _evaluation(settings: DataSettings, kind: Kind) -> list[Example]:
    """The first examples of the evaluation split."""
    path = settings.eval_path or settings.path
    if path == BUILTIN:
        return _builtin(settings, kind, _max_evaluation(settings), "eval")
    if settings.eval_rows == 0:
        return []
    split = settings.eval_split or ("train" if os.path.isfile(path) else "validation")
    table = _read(path, split, settings)
    count = min(_max_evaluation(settings), len(table))
    return examples_of(table, list(range(count)), kind, path)


def _read(path: str, split: str, settings: DataSettings) -> datasets.Dataset:
    """The table of a file, a folder or a data set on the hub, with canonical column names.

    Raises:
      InputError: it cannot be read, or is empty.
    """
    local = os.path.expanduser(path)
    if os.path.isdir(local):
        table = read_files(files_of_split(Path(local), split), split, settings.columns)
    elif os.path.isfile(local):
        table = read_files([single_file(Path(local), split)], split, settings.columns)
    elif looks_local(path):
        raise InputError(
            f"There is no file or folder {path}: give one that exists, the name of a data set on "
            f'the hub, or "{BUILTIN}".'
        )
    else:
        table = _read_hub(path, settings.name, split)
    if len(table) == 0:
        raise InputError(f"{path} has no rows in the split {split!r}: give one that has some.")
    return _rename(table, settings.columns, path)


def _read_hub(path: str, name: str | None, split: str) -> datasets.Dataset:
    """A split of a data set on the hub."""
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise InputError(
            f"The data set {path} (split {split!r}) is neither a local file nor available on the "
            f"hub: check its name and split, and if this machine is offline give a local file "
            f"({reason})."
        ) from error


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
