"""The command `benchmark.py`: both sides of each workload, a table, and all numbers as JSON."""

import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jaxlib
import numpy as np
from etils import epath

from rlhf_jax.benchmark import check, environment
from rlhf_jax.benchmark.floor import Phase, phases_of
from rlhf_jax.benchmark.machine import best_of, busy_cores, hardware, measure_machine
from rlhf_jax.benchmark.results import Sides, summarize
from rlhf_jax.benchmark.settings import BenchmarkConfig
from rlhf_jax.benchmark.sides import SideCommand, our_command, take_turns, trl_command
from rlhf_jax.benchmark.table import as_text
from rlhf_jax.benchmark.workloads import Workload
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.config import parse, resolve


def run_benchmark(config: BenchmarkConfig | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Checks, measures and prints, and returns the numbers.

    Args:
      config: or a nested dict of the same form; by default that of the command line.

    Raises:
      InputError: wrong settings, or TRL cannot be installed.
      BenchmarkError: a check failed, or a side ended before it was told to.
    """
    if config is None:
        config = parse(BenchmarkConfig, _whole_flags(sys.argv[1:]))
    config = resolve(BenchmarkConfig, config)
    _check_file(config.json)  # now, and not after an hour
    commands = _commands(config)
    checks, busy = None, [busy_cores()]
    if config.check:
        _say("checking losses, gradients and samples against the plain path")
        checks = [found._asdict() for found in check.check_all(config.chosen)]
    _say("measuring what the machine can do")
    machine = measure_machine()
    sides = {each: measure(each, commands, config) for each in config.chosen}
    machine = best_of(machine, measure_machine())
    dtypes = [command.dtype for command in commands if command.name != "trl"]
    busy.append(busy_cores())
    found = [summarize(each, sides[each], _phases(each, dtypes), machine) for each in sides]
    result = _described(config, machine, checks) | {"busy_cores": busy, "workloads": found}
    result["versions"] |= _peer_versions(found)
    print(as_text(result))
    if config.json is not None:
        _write(config.json, json.dumps(result, indent=1) + "\n")
    return result


def _whole_flags(argv: list[str]) -> list[str]:
    """`--peer none` as short for `--peer.name none`."""
    short = {"--peer=none": "--peer.name=none", "--peer=trl": "--peer.name=trl"}
    after = [*argv[1:], ""]
    return [
        "--peer.name" if flag == "--peer" and value in ("none", "trl") else short.get(flag, flag)
        for flag, value in zip(argv, after, strict=True)
    ]


def measure(workload: Workload, commands: Sequence[SideCommand], config: BenchmarkConfig) -> Sides:
    """One workload on all sides, as `take_turns` gives it; the medians on standard error."""
    _say(f"measuring {workload.name}")
    sides = take_turns(commands, workload, rounds=config.rounds, warmup=config.warmup)
    medians = (f"{name} {np.median(side['seconds']):.3f} s" for name, side in sides.items())
    _say(f"  {', '.join(medians)}")
    return sides


def _phases(workload: Workload, dtypes: Sequence[str]) -> dict[str, list[Phase]]:
    return {dtype: phases_of(workload, dtype) for dtype in dtypes}


def _commands(config: BenchmarkConfig) -> list[SideCommand]:
    """Ours first, then TRL, then ours in bfloat16."""
    commands = [our_command("float32")]
    if config.peer.name == "trl":
        commands.append(trl_command(environment.peer_python(config.peer), config.peer.dtype))
    if config.dtype != "float32":
        commands.append(our_command(config.dtype))
    return commands


def _described(config, machine, checks):
    """What has to be said of figures."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(sys.argv),
        "hardware": hardware(),
        "versions": {
            "rlhf_jax": metadata.version("rlhf-jax"),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": sys.version.split()[0],
        },
        "machine": machine._asdict(),
        "checks": checks,
        **dataclasses.asdict(config),
    }


def _peer_versions(found: list[dict[str, Any]]) -> dict[str, str]:
    """What TRL ran with."""
    versions = found[0]["sides"].get("trl", {}).get("ready", {}).get("versions", {})
    shared = ("python", "numpy")
    return {f"TRL's {name}" if name in shared else name: text for name, text in versions.items()}


def _check_file(path: str | None) -> None:
    """Raises an InputError if the numbers could not be written."""
    if path is None:
        return
    file = epath.Path(path)
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(
            f"json is {path}, which is a folder or in none; give --json a file in a folder that "
            "is there."
        )


def _write(path: str, text: str) -> None:
    try:
        epath.Path(path).write_text(text)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}.") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
