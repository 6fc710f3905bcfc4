"""The command `benchmark.py`: both sides of each workload, a table, and all numbers as JSON."""

import dataclasses
import datetime
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jaxlib
import numpy as np
from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.config import parse, resolve
from rlhf_jax.runtime.run.folder import replace_file
from scripts.benchmark import check, environment
from scripts.benchmark.apart import apart
from scripts.benchmark.check_attention import check_attention
from scripts.benchmark.floor import Phase, phases_of
from scripts.benchmark.machine import best_of, busy_cores, hardware, measure_machine
from scripts.benchmark.results import Sides, summarize
from scripts.benchmark.settings import BenchmarkConfig
from scripts.benchmark.sides import (
    SideCommand,
    commands_for,
    our_command,
    take_turns,
    trl_command,
)
from scripts.benchmark.table import as_text
from scripts.benchmark.workloads import Workload, in_float32


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
    chosen = config.chosen(jax.default_backend())
    commands = _commands(config)
    busy = [busy_cores()]
    described = _described(config) | _checked(config, chosen)
    _say("measuring what the machine can do")
    machine = apart(measure_machine)
    phases = {each: _phases(each, commands_for(commands, each)) for each in chosen}
    sides: dict[Workload, Sides] = {}
    for each in chosen:
        sides[each] = measure(each, commands, config)
        # A side that fails later takes nothing of this with it.
        _write(config.json, described | _found(sides, phases, machine, busy))
    machine = best_of(machine, apart(measure_machine))
    busy.append(busy_cores())
    result = described | _found(sides, phases, machine, busy)
    print(as_text(result))
    _write(config.json, result)
    return result


def _whole_flags(argv: list[str]) -> list[str]:
    """`--peer none` as short for `--peer.name none`; a file of that section is left as it is.

    >>> _whole_flags(["--peer", "none", "--peer=trl"])
    ['--peer.name', 'none', '--peer.name=trl']
    """
    whole = []
    for flag, following in zip(argv, [*argv[1:], "--"], strict=True):
        name, _, value = flag.partition("=")
        value = value or following
        is_short = name == "--peer" and not value.startswith(("-", "{"))
        is_short = is_short and not os.path.isfile(value)
        whole.append(flag.replace("--peer", "--peer.name", 1) if is_short else flag)
    return whole


def _found(sides, phases, machine, busy):
    """What was measured until now, ready for JSON."""
    workloads = [summarize(each, sides[each], phases[each], machine) for each in sides]
    return {
        "versions": _versions() | _peer_versions(workloads),
        "machine": machine._asdict(),
        "busy_cores": busy,
        "workloads": workloads,
    }


def measure(workload: Workload, commands: Sequence[SideCommand], config: BenchmarkConfig) -> Sides:
    """One workload on all sides, as `take_turns` gives it; the medians on standard error."""
    _say(f"measuring {workload.name}")
    sides = take_turns(
        commands_for(commands, workload),
        workload,
        rounds=config.rounds,
        warmup=config.warmup,
        alternate=_alternates(),
    )
    medians = (f"{name} {np.median(side['seconds']):.3f} s" for name, side in sides.items())
    _say(f"  {', '.join(medians)}")
    return sides


def _alternates() -> bool:
    """Whether sides take turns: on a GPU neither is to hold memory while the other runs."""
    return jax.default_backend() == "cpu"


def _phases(workload: Workload, commands: Sequence[SideCommand]) -> dict[str, list[Phase]]:
    dtypes = dict.fromkeys(command.dtype for command in commands if command.name != "trl")
    return {dtype: phases_of(workload, dtype) for dtype in dtypes}


def _checked(config: BenchmarkConfig, workloads: Sequence[Workload]) -> dict[str, Any]:
    """What checks found; each is None where there was none."""
    found: dict[str, Any] = {"checks": None, "attention": None}
    if not config.check:
        return found
    _say("checking losses, gradients and samples against the plain path")
    plain = [in_float32(each) for each in workloads]
    found["checks"] = [each._asdict() for each in apart(check.check_all, plain)]
    if any(each.ours.attention == "cudnn" for each in workloads):
        _say("checking cuDNN's attention against ours")
        found["attention"] = apart(check_attention)._asdict()
    return found


def _commands(config: BenchmarkConfig) -> list[SideCommand]:
    """Ours first, then TRL, then ours in bfloat16."""
    commands, platform = [our_command("float32")], jax.default_backend()
    if config.peer.name == "trl":
        python = environment.peer_python(config.peer)
        if platform == "gpu":
            environment.check_cuda(python)
        commands.append(trl_command(python, config.peer.dtype, platform))
    if config.dtype != "float32":
        commands.append(our_command(config.dtype))
    return commands


def _described(config):
    """What has to be said of figures, whatever they are."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(sys.argv),
        "hardware": hardware(),
        "alternate": _alternates(),
        **dataclasses.asdict(config),
    }


def _versions() -> dict[str, str]:
    return {
        "rlhf_jax": metadata.version("rlhf-jax"),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
    }


def _peer_versions(found: list[dict[str, Any]]) -> dict[str, str]:
    """What TRL ran with."""
    ready = (each["sides"].get("trl", {}).get("ready", {}) for each in found)
    versions: dict[str, str] = next((said["versions"] for said in ready if "versions" in said), {})
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


def _write(path: str | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}.") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
