"""Examples of text from the embedded corpus, from local files or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import builtin, tasks
from rlhf_jax.data.conversations import Examples, split_conversations
from rlhf_jax.data.examples import Example
from rlhf_jax.data.files import Table, is_one_split, read_table
from rlhf_jax.data.formats import (
    CANONICAL,
    FORMATS,
    KEEP_COLUMNS,
    Kind,
    examples_of,
    labelled,
    ranking_of,
)
from rlhf_jax.data.settings import BUILTIN, DataSettings
from rlhf_jax.errors import InputError

MAX_HELD_OUT = 512


def load_examples(
    settings: DataSettings, kind: Kind, *, quiet: bool = False
) -> tuple[Examples, Examples]:
    """The training and the evaluation examples, with canonical column names.

    Args:
      settings: the source and the number of examples.
      kind: "text", "pairs", "rankings", "unpaired", "prompts" or "references".
      quiet: whether to skip the warning of dropped examples, for a second pass over the same data.

    Returns:
      (train, evaluation), lists of dicts. "text" examples have `prompt` and `completion`, or
      `messages`, or `text`; of comparisons, the preferred response or conversation. "pairs" have
      `chosen`, `rejected`, `margin` (0.0 if the file has none) and `prompt` ("" if it has none);
      every two of `responses`, best first, make one. "rankings" have `responses` instead of
      `chosen` and `rejected`, a list of any length. "unpaired" have `prompt`, `completion` and
      `label`, True for a desirable one; a pair makes two. "prompts" have `prompt` or `text` and
      every other column of the file, for reward functions, "references" have `prompt`,
      `completion` and every other column. Each text except `text` may be messages instead.

    Raises:
      InputError: naming the file, if it is missing, empty or unreadable, lacks the columns, or has
        an example without text.
    """
    if kind not in FORMATS:
        raise InputError(f"The kind of examples is {kind!r}: it is one of {', '.join(FORMATS)}.")
    paths = settings.path, settings.eval_path or settings.path
    train, evaluation = (
        split_conversations(examples, kind, settings, path, quiet=quiet)
        for examples, path in zip(_load(settings, kind), paths, strict=True)
    )
    return train, evaluation


def _load(settings: DataSettings, kind: Kind) -> tuple[Examples, Examples]:
    """(train, evaluation), before conversations are split."""
    path, has_own = settings.path, settings.eval_path is not None or settings.eval_split is not None
    if path == BUILTIN or tasks.is_task(path):
        train = _generated(settings, kind, path, settings.builtin_rows, "train")
        return train[: settings.max_rows], _evaluation(settings, kind)
    table = _read(path, settings.split, settings, kind)
    order = np.random.default_rng(settings.seed).permutation(table.size)
    if has_own:
        evaluation = _evaluation(settings, kind)
    else:
        cut = table.size - _held_out(settings, table.size)
        evaluation = examples_of(table, sorted(order[cut:].tolist()), kind, path)
        order = order[:cut]
    selected = sorted(order[: settings.max_rows].tolist())
    return examples_of(table, selected, kind, path), evaluation


def _generated(
    settings: DataSettings, kind: Kind, path: str, count: int, split: builtin.Split
) -> Examples:
    """Examples of the embedded corpus or of a task; the two splits share no prompt."""
    generator: Any = builtin
    arguments: tuple[Any, ...] = (settings.seed, count, split)
    if path != BUILTIN:
        generator, arguments = tasks, (path, settings.task, *arguments)
    if kind in ("text", "references"):
        return generator.texts(*arguments)
    if kind == "prompts":
        return generator.prompts(*arguments)
    pairs = generator.pairs(*arguments)
    if kind == "unpaired":
        return [example for pair in pairs for example in labelled(pair)]
    return pairs if kind == "pairs" else [ranking_of(pair) for pair in pairs]


def _held_out(settings: DataSettings, total: int) -> int:
    """The number of examples to hold out."""
    if settings.eval_rows is None:
        return min(MAX_HELD_OUT, total // 10)
    if settings.eval_rows >= total:
        raise InputError(
            f"data.eval_rows holds out {settings.eval_rows} of the {total} examples of "
            f"{settings.path} and leaves none to train on: set it lower, or give data.eval_path."
        )
    return settings.eval_rows


def _evaluation(settings: DataSettings, kind: Kind) -> Examples:
    """The first examples of the evaluation split."""
    path = settings.eval_path or settings.path
    count = MAX_HELD_OUT if settings.eval_rows is None else settings.eval_rows
    if path == BUILTIN or tasks.is_task(path):
        return _generated(settings, kind, path, count, "eval")
    if count == 0:
        return []
    split = settings.eval_split or ("train" if is_one_split(path) else "validation")
    table = _read(path, split, settings, kind)
    return examples_of(table, range(min(count, table.size)), kind, path)


def _without_nulls(value: Any) -> Any:
    """Messages or tools without the nulls that fill the keys of other examples' objects."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _read(path: str, split: str, settings: DataSettings, kind: Kind) -> Table:
    """The table of a file, a folder or a data set on the hub, with canonical column names.

    Raises:
      InputError: it cannot be read, or is empty.
    """
    names = settings.columns
    used = None if kind in KEEP_COLUMNS else {names.get(column, column) for column in CANONICAL}
    table = read_table(path, settings.name, split, used)
    if table.size == 0:
        raise InputError(f"{path} has no examples in the split {split!r}: give one that has some.")
    for canonical, column in names.items():
        if column not in table.columns:
            raise InputError(
                f"data.columns maps {canonical!r} to {column!r}, but {path} has the columns "
                f"{', '.join(table.columns)}."
            )
    sources = {c: c for c in table.columns if c not in {*names, *names.values()}} | names
    kept = {name: column for name, column in sources.items() if used is None or column in used}

    def value_of(each: Example, name: str) -> Any:
        value = each.get(kept[name])
        return _without_nulls(value) if table.has_one_schema and name in CANONICAL else value

    def read(indices: Sequence[int]) -> list[Example]:
        return [
            Example({name: value_of(each, name) for name in kept}, each.place)
            for each in table.read(indices)
        ]

    return Table(list(sources), table.size, read)
