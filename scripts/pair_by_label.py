"""Preference pairs from labelled texts: each text of one label is preferred to one of the other.

python scripts/pair_by_label.py train.jsonl.gz pairs.jsonl --preferred 1 --other 0

Texts are shuffled by the seed and paired in that order, each used once; what is left over of the
more frequent label is not written. The output has the columns `chosen` and `rejected`.
"""

import json
import random
import sys
from pathlib import Path

from jsonargparse import auto_cli

from rlhf_jax.data.datasets import Settings, load_examples
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands.terminal import INPUT_ERROR


def pair_by_label(
    source: str,
    output: str,
    *,
    preferred: int = 1,
    other: int = 0,
    label: str = "label",
    split: str = "train",
    seed: int = 0,
) -> int:
    """Writes the pairs and returns how many there are.

    Args:
      source: a hub name, or a local file of JSONL, CSV or Parquet with `text` and a label.
      output: the JSONL file to write.
      preferred: label of the texts that win.
      other: label of those that lose.
      label: name of the column with the labels.
      split: of a hub data set.
      seed: of the order.
    """
    rows, _ = load_examples(Settings(path=source, split=split, eval_rows=0), "prompts")
    for column in ("text", label):
        if column not in rows[0]:
            raise InputError(
                f"{source} has no column {column!r}; its columns are {', '.join(rows[0])}."
            )
    random.Random(seed).shuffle(rows)
    sides = [[row["text"] for row in rows if row[label] == side] for side in (preferred, other)]
    pairs = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in zip(*sides)]
    if not pairs:
        found = sorted({str(row[label]) for row in rows})
        raise InputError(
            f"No pair with the labels {preferred} and {other}: there are {', '.join(found)}."
        )
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    try:
        Path(output).write_text(lines, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}; give another.") from error
    return len(pairs)


if __name__ == "__main__":
    try:
        print(f"{auto_cli(pair_by_label)} pairs")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(INPUT_ERROR)
