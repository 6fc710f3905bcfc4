"""Preference pairs from other data: `rlhf pairs by-label`, `by-prompt` and `sample`."""

import argparse
import inspect
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_jax import runtime
from rlhf_jax.data.conversations import Examples
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands import terminal
from rlhf_jax.runtime.commands.terminal import INPUT_ERROR
from rlhf_jax.runtime.config import PairsConfig


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
    """Makes preference pairs from labelled texts: each text of one label and one of the other.

    Texts are shuffled by the seed and paired in that order, each used once; surplus texts of the
    more frequent label are not written. The output has the columns `chosen` and `rejected`.

    Args:
      source: a hub name, or a local file of JSONL, CSV or Parquet with `text` and a label.
      output: the JSONL file to write.
      preferred: label of the chosen texts.
      other: label of the rejected texts.
      label: name of the column with the labels.
      split: of a hub data set.
      seed: of the order.

    Returns:
      The number of pairs.
    """
    texts = _load(source, split, "prompts")
    for column in ("text", label):
        if column not in texts[0]:
            raise InputError(
                f"{source} has no column {column!r}; its columns are {', '.join(texts[0])}."
            )
    random.Random(seed).shuffle(texts)
    # In a CSV file labels are texts.
    labelled = [(str(each[label]).strip(), each["text"]) for each in texts]
    sides = [[text for name, text in labelled if name == str(side)] for side in (preferred, other)]
    pairs = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in zip(*sides)]
    if not pairs:
        labels = sorted({name for name, _ in labelled})
        raise InputError(
            f"No pair with the labels {preferred} and {other}: there are {', '.join(labels)}."
        )
    return _write(pairs, output)


def pair_by_prompt(source: str, output: str, *, split: str = "train", seed: int = 0) -> int:
    """Makes preference pairs from prompts with completions: each is preferred to another prompt's.

    A reward model trained on them scores whether a response belongs to its prompt. The rejected
    response is the completion of the next example, in an order shuffled by the seed, so that both
    sides of the file hold the same texts and neither length nor style predicts the preference.
    Pairs of equal texts are skipped; their number is printed to standard error. The output has the
    columns `prompt`, `chosen` and `rejected`.

    Args:
      source: a hub name, or a local file of JSONL, CSV or Parquet with `prompt` and `completion`.
      output: the JSONL file to write.
      split: of a hub data set.
      seed: of the order.

    Returns:
      The number of pairs.
    """
    texts = _load(source, split, "text")
    if "completion" not in texts[0] or len(texts) < 2:
        raise InputError(
            f"{source} has no two examples with the columns `prompt` and `completion`."
        )
    random.Random(seed).shuffle(texts)
    pairs = [
        {"prompt": each["prompt"], "chosen": each["completion"], "rejected": other["completion"]}
        for each, other in zip(texts, texts[1:] + texts[:1], strict=True)
        if each["completion"] != other["completion"]
    ]
    if not pairs:
        raise InputError(f"The completions in {source} are all equal; give texts that differ.")
    if skipped := len(texts) - len(pairs):
        print(f"{skipped} of {len(texts)} pairs of equal texts were skipped", file=sys.stderr)
    return _write(pairs, output)


def sample(config: PairsConfig) -> None:
    """Makes pairs of a model's own responses: the best and the worst of several by a score."""
    from rlhf_jax.runtime.commands.generate import check_output
    from rlhf_jax.runtime.sampling.pairs import find_rewards

    find_rewards(config, "pairs sample")  # a command that is refused leaves no file
    check_output(config.output)
    print(f"{runtime.run_pairs(config)} pairs")


SAMPLE_FIRST = (
    *("model.path", "model.reward_path", "data.path", "output", "num_samples", "keep_truncated"),
    *("generation.max_new_tokens", "generation.temperature", "generation.top_p", "seed"),
)
COMMANDS: dict[str, Callable[..., int]] = {"by-label": pair_by_label, "by-prompt": pair_by_prompt}


def main(argv: Sequence[str], prog: str = "rlhf pairs", name: str | None = None) -> int:
    """Runs `rlhf pairs` and prints the number of pairs; `sample` has a configuration as `rlhf sft`.

    Args:
      argv: the command-line arguments.
      prog: the name of the program, for the help.
      name: "by-label" or "by-prompt", if it is not the first argument.

    Returns:
      The exit status: 0, or 2 after an `InputError`.
    """
    if name is None and argv[:1] == ["sample"]:
        rest = argv[1:]
        return terminal.run_command(f"{prog} sample", PairsConfig, sample, rest, first=SAMPLE_FIRST)
    arguments = vars(_parser(prog, name).parse_args(argv))
    command = COMMANDS[arguments.pop("command", name)]
    try:
        count = command(**arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    print(f"{count} pairs")
    return 0


def _parser(prog: str, name: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    if name is not None:
        _add_arguments(parser, COMMANDS[name])
        return parser
    commands = parser.add_subparsers(dest="command", required=True)
    for key, function in COMMANDS.items():
        _add_arguments(commands.add_parser(key, help=_summary(function)), function)
    commands.add_parser("sample", help=_summary(sample))
    return parser


def _summary(function: Callable[..., object]) -> str:
    return inspect.cleandoc(function.__doc__ or "").partition("\n")[0]


def _add_arguments(parser: argparse.ArgumentParser, function: Callable[..., int]) -> None:
    """A positional argument for each parameter without a default, a flag for each other."""
    doc = inspect.cleandoc(function.__doc__ or "")
    parser.description = " ".join(doc.partition("\n\nArgs:")[0].split())
    notes = dict(re.findall(r"^  (\w+): (.+)$", doc, re.M))
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty:
            parser.add_argument(key, help=notes[key])
        else:
            note = f"{notes[key].rstrip('.')} (default: {parameter.default})"
            parser.add_argument(
                f"--{key}", type=type(parameter.default), default=parameter.default, help=note
            )


def _load(source: str, split: str, kind: Kind) -> Examples:
    """All examples of a file or of a split of a hub data set."""
    return load_examples(DataSettings(path=source, split=split, eval_rows=0), kind)[0]


def _write(pairs: Examples, output: str) -> int:
    """Writes the pairs as JSONL; returns their number."""
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    try:
        Path(output).write_text(lines, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}; give another.") from error
    return len(pairs)
