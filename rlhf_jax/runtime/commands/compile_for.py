"""The command `compile-for`: memory and FLOPs of a stage on devices that need not exist."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rlhf_jax import training
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands import terminal
from rlhf_jax.runtime.compilation import TOPOLOGIES
from rlhf_jax.runtime.config import RLHFConfig, RunConfig, config_of, parse, trainer_named
from rlhf_jax.runtime.parsing import split_flags
from rlhf_jax.runtime.yaml_files import read_yaml


def main(argv: Sequence[str]) -> int:
    """The command line, after `rlhf compile-for`; the exit status is that of `terminal.run`."""
    if "-h" in argv or "--help" in argv:
        _parser().print_help()
        return 0
    return terminal.run(lambda: run_compile_for(argv))


def run_compile_for(argv: Sequence[str]) -> dict[str, Any]:
    """Prints the cost of a stage, and returns the numbers.

    Raises:
      InputError: one sentence about a mistake in the flags, the configuration or the mesh.
    """
    flags, rest = _parser().parse_known_args(argv)
    if flags.topology is None:
        raise InputError(f"--topology is missing; give {TOPOLOGIES}.")
    config = read_config(rest, flags.stage)
    from etils import epath  # here, so that --help does without these

    from rlhf_jax.runtime.compilation.cost import as_text, stage_cost
    from rlhf_jax.runtime.run.folder import disk_errors

    numbers = stage_cost(
        config, flags.topology, model_name=flags.model, num_responses=flags.num_responses
    )
    print(as_text(numbers))
    if flags.json is not None:
        path = epath.Path(flags.json)
        with disk_errors(path, "give --json a file that can be written"):
            path.write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf compile-for",
        allow_abbrev=False,
        usage="rlhf compile-for --topology NAME [--config FILE.yaml] [--section.key VALUE ...]",
        description="Compiles the steps of a stage for devices that need not exist, and prints "
        "their memory and FLOPs. All other settings are those of the stage's own command.",
    )
    add = parser.add_argument
    add("--topology", help=TOPOLOGIES)
    add(
        "--model",
        help="the name of a known model, or a folder with a config.json; by default the model of "
        "the configuration",
    )
    add("--stage", help=f"{', '.join(_names())}; by default the one that the configuration has")
    add("--num_responses", type=int, default=4, help="responses to a prompt, in rankings")
    add("--json", help="a file for the numbers")
    return parser


def _names() -> list[str]:
    return [trainer.name for trainer in training.TRAINERS]


def read_config(argv: Sequence[str], stage: str | None) -> RunConfig:
    """The configuration of the stage, also in a configuration of `rlhf run`.

    Args:
      argv: `--config FILE.yaml --section.key value ...`.
      stage: the name of its trainer; None for the only one that has a section.

    Raises:
      InputError: the stage is unknown or ambiguous, or as `config.parse` raises.
    """
    names = _names()
    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    if stage not in (*names, None):
        raise InputError(f"--stage must be one of {', '.join(names)}, but is {stage!r}.")
    sections = _sections(argv)
    present = [name for name in names if name in sections]
    parts = [sections[name] for name in ("data", "optimizer") if name in sections]
    is_pipeline = len(present) > 1 or any(part & {*names} for part in parts)
    if stage is None and (is_pipeline or not present):
        raise InputError(
            f"The configuration has no single section {listed}, which would tell the stage to be "
            f"compiled; give --stage {listed}."
        )
    if not is_pipeline:
        return parse(config_of(trainer_named(stage or present[0])), argv)
    from rlhf_jax.runtime.commands.pipeline import stage_configs

    pipeline = parse(RLHFConfig, argv)
    stages = {each.trainer.name: each for each in stage_configs(pipeline)}
    if stage not in stages:
        raise InputError(
            f"With these settings `rlhf run` has the stages {', '.join(stages)}, but not {stage}; "
            "give --stage one of them."
        )
    # Later stages start from the exports of earlier ones, which have the first model's sizes.
    return dataclasses.replace(stages[stage], model=pipeline.model)


def _sections(argv: Sequence[str]) -> dict[str, set[str]]:
    """The keys in each section of the files and flags; `parse` checks them."""
    flags = split_flags(argv)
    sections: dict[str, set[str]] = {}
    for content in map(read_yaml, flags.files):
        for name, keys in content.items() if isinstance(content, dict) else ():
            sections.setdefault(name, set()).update(keys if isinstance(keys, dict) else ())
    for key, _ in flags.settings:
        name, *rest = key.split(".")
        sections.setdefault(name, set()).update(rest[:1])
    return sections
