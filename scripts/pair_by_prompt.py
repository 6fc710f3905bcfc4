"""Preference pairs from prompts with completions: each is preferred to that of another prompt.

python scripts/pair_by_prompt.py train.jsonl.gz pairs.jsonl

A reward model that is trained on them says whether a response belongs to its prompt. The completion
of the next row, in an order shuffled by the seed, is the rejected one, so that over the file both
sides hold the same texts, and neither length nor style gives the preference away. A pair whose two
texts are equal is skipped. The output has the columns `prompt`, `chosen` and `rejected`.
"""

import json
import random
import sys
from pathlib import Path

from jsonargparse import auto_cli

from rlhf_jax.data.datasets import Settings, load_examples
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands.terminal import INPUT_ERROR


def pair_by_prompt(source: str, output: str, *, split: str = "train", seed: int = 0) -> int:
    """Makes preference pairs: to each prompt its own completion, preferred to another prompt's.

    How many pairs had two equal texts, and were skipped, is said on standard error.

    Args:
      source: a hub name, or a local file of JSONL, CSV or Parquet with `prompt` and `completion`.
      output: the JSONL file to write.
      split: of a hub data set.
      seed: of the order.

    Returns:
      How many pairs were written.
    """
    rows, _ = load_examples(Settings(path=source, split=split, eval_rows=0), "text")
    if "completion" not in rows[0] or len(rows) < 2:
        raise InputError(f"{source} has no two rows with the columns `prompt` and `completion`.")
    random.Random(seed).shuffle(rows)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
        if row["completion"] != other["completion"]
    ]
    if not pairs:
        raise InputError(f"The completions in {source} are all equal; give texts that differ.")
    if skipped := len(rows) - len(pairs):
        print(f"{skipped} of {len(rows)} pairs of equal texts were skipped", file=sys.stderr)
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    try:
        Path(output).write_text(lines, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}; give another.") from error
    return len(pairs)


if __name__ == "__main__":
    try:
        print(f"{auto_cli(pair_by_prompt)} pairs")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(INPUT_ERROR)
