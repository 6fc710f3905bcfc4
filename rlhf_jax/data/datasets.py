"""Rows of text from the embedded corpus, from local files or from the hub, under canonical names.

Five kinds of rows are understood. `text`: `prompt` + `completion`, or `messages`, or `text`.
`pairs`: an optional `prompt` with `chosen` and `rejected` (and perhaps a `margin`), or with
`responses`, best first, of which every two make a pair. `rankings`: the same columns, with a pair
as a ranking of two. `prompts`: `prompt` or `text`; all other columns are kept for reward functions.
`references`: the same, but each row has a `prompt` and a `completion`, the reference response.
All but `text` may hold messages instead of a text. A file of comparisons is read as `text` and as
`prompts` too: the preferred responses, and what they answer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.data import builtin
from rlhf_jax.data.conversations import split_conversations
from rlhf_jax.data.files import files_of_split, looks_local, read_files, single_file
from rlhf_jax.data.formats import CANONICAL, FORMATS, Kind, Row, examples_of, ranking_of
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

BUILTIN = "builtin"
MAX_HELD_OUT = 512


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
      split_at: splits texts that are whole conversations behind the last place where they have
        this, say "\\n\\nAssistant:", into prompt and response. Where a prompt is given nothing is
        split. Rows that do not have it are dropped, and pairs that are not the same before it.
      prompt_suffix: what prompts end with, say "TL;DR:". Prompts that are too long then lose the
        right end of what stands before it. Where the responses begin with it, it goes over to the
        prompt, on a line of its own.
      min_response_words: pairs with a response of fewer words are dropped; of rankings, the
        response.

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
    split_at: str | None = None
    prompt_suffix: str | None = None
    min_response_words: int = 0

    def __post_init__(self) -> None:
        for key in ("builtin_rows", "max_prompt_length"):
            _at_least(1, key, getattr(self, key))
        # Two tokens are the shortest text of which one is predicted, one and EOS a response.
        for key in ("max_length", "max_response_length"):
            _at_least(2, key, getattr(self, key))
        for key in ("seed", "min_response_words"):
            _at_least(0, key, getattr(self, key))
        for key in ("split_at", "prompt_suffix"):
            if getattr(self, key) is not None and not getattr(self, key).strip():
                raise InputError(f"data.{key} is empty: give it a text, or leave it out (null).")
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


def load_examples(
    settings: Settings, kind: Kind, *, quiet: bool = False
) -> tuple[list[Row], list[Row]]:
    """The training and the evaluation rows, with canonical column names.

    Args:
      settings: where they are and how many are wanted.
      kind: "text", "pairs", "rankings", "prompts" or "references".
      quiet: leaves out the warning of dropped rows, for who reads the same rows again.

    Returns:
      (train_rows, eval_rows), lists of dicts. "text" rows have `prompt` and `completion`, or
      `messages`, or `text`. "pairs" rows have `chosen`, `rejected`, `margin` (0.0 where the file
      has none) and `prompt` ("" likewise). "rankings" rows have `responses` in their stead, a list
      of any length. "prompts" rows have `prompt` or `text` and every other column of the file,
      "references" rows `prompt`, `completion` and every other one. Each text may be messages
      instead, but for `text`.

    Raises:
      InputError: in one sentence that names the file, if it is missing, empty or unreadable, has
        not the columns, or has a row without text.
    """
    if kind not in FORMATS:
        raise InputError(f"The kind of rows is {kind!r}: it is one of {', '.join(FORMATS)}.")
    train, evaluation = _rows(settings, kind)
    eval_path = settings.eval_path or settings.path
    train = split_conversations(train, kind, settings, settings.path, quiet=quiet)
    evaluation = split_conversations(evaluation, kind, settings, eval_path, quiet=quiet)
    if kind == "prompts":
        _check_prompts(train, settings.path)
        _check_prompts(evaluation, eval_path)
    return train, evaluation


def _check_prompts(rows: list[Row], path: str) -> None:
    """Raises if a row has a whole conversation in which the prompt was not looked for."""
    if any("prompt" not in row and "text" not in row for row in rows):
        raise InputError(
            f"Of {path} the column `chosen` is read for its prompts, but holds texts: say in "
            'data.split_at where the responses begin ("\\n\\nAssistant:", say), or name the column '
            "of prompts in data.columns."
        )


def _rows(settings: Settings, kind: Kind) -> tuple[list[Row], list[Row]]:
    """The rows as `load_examples` gives them, but for prompts that are inside other texts."""
    if settings.path == BUILTIN:
        train = _builtin_rows(settings, kind, settings.builtin_rows, "train")[: settings.max_rows]
        if settings.eval_path is not None:
            return train, _evaluation_rows(settings, kind)
        wanted = MAX_HELD_OUT if settings.eval_rows is None else settings.eval_rows
        return train, _builtin_rows(settings, kind, wanted, "eval")
    table = _read(settings.path, settings.split, settings)
    order = np.random.default_rng(settings.seed).permutation(len(table))
    if settings.eval_path is None and settings.eval_split is None:
        held_out = _held_out(settings, len(table))
        cut = len(table) - held_out
        evaluation = examples_of(table, sorted(order[cut:].tolist()), kind, settings.path)
        order = order[:cut]
    else:
        evaluation = _evaluation_rows(settings, kind)
    chosen = sorted(order[: settings.max_rows].tolist())
    return examples_of(table, chosen, kind, settings.path), evaluation


def _builtin_rows(settings: Settings, kind: Kind, rows: int, split: builtin.Split) -> list[Row]:
    """Rows of the embedded corpus; the two splits share no prompt."""
    if kind in ("text", "references"):
        return builtin.texts(settings.seed, rows, split)
    if kind == "pairs":
        return builtin.pairs(settings.seed, rows, split)
    if kind == "rankings":
        return [ranking_of(row) for row in builtin.pairs(settings.seed, rows, split)]
    return builtin.prompts(settings.seed, rows, split)


def _held_out(settings: Settings, rows: int) -> int:
    """How many rows to hold out of so many."""
    if settings.eval_rows is None:
        return min(MAX_HELD_OUT, rows // 10)
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
        rows = MAX_HELD_OUT if settings.eval_rows is None else settings.eval_rows
        return _builtin_rows(settings, kind, rows, "eval")
    if settings.eval_rows == 0:
        return []
    split = settings.eval_split or ("train" if os.path.isfile(path) else "validation")
    table = _read(path, split, settings)
    most = MAX_HELD_OUT if settings.eval_rows is None else settings.eval_rows
    return examples_of(table, list(range(min(most, len(table)))), kind, path)


def _read(path: str, split: str, settings: Settings) -> datasets.Dataset:
    """The table behind a path, renamed: a file, a folder or a data set on the hub; never empty."""
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
            f"The data set {path} (split {split!r}) is neither a local file nor to be had from the "
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
