"""The benchmark: checks, measures each workload on both sides, prints a table, writes JSON."""

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

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import described_model
from rlhf_jax.runtime.config import resolve
from rlhf_jax.runtime.run.folder import replace_file
from scripts.benchmark import check, environment
from scripts.benchmark.check_attention import check_attention
from scripts.benchmark.floor import Phase, phases_of
from scripts.benchmark.isolation import isolated
from scripts.benchmark.machine import best_of, busy_cores, hardware, measure_machine
from scripts.benchmark.programs import make_model
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


def run_benchmark(config: BenchmarkConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Checks, measures and prints.

    Args:
      config: the settings, or a nested dict of the same structure.

    Returns:
      All numbers, as the JSON file holds them.

    Raises:
      InputError: wrong settings, or TRL cannot be installed.
      BenchmarkError: a check failed, or a measured process ended early.
    """
    config = resolve(BenchmarkConfig, config)
    _check_file(config.json)  # now, and not after an hour
    chosen = config.chosen(jax.default_backend())
    _check_model(config.model_path, chosen)
    commands = _commands(config)
    busy = [busy_cores()]
    description = _description(config) | _checks(config, chosen)
    _log("measuring the peak rates of the machine")
    machine = isolated(measure_machine)
    phases = {each: _phases(each, commands_for(commands, each)) for each in chosen}
    sides: dict[Workload, Sides] = {}
    for each in chosen:
        sides[each] = measure(each, commands, config)
        # A later failure does not lose this workload.
        _write(config.json, description | _measurements(sides, phases, machine, busy))
    machine = best_of(machine, isolated(measure_machine))
    busy.append(busy_cores())
    result = description | _measurements(sides, phases, machine, busy)
    print(as_text(result))
    _write(config.json, result)
    return result


def _measurements(sides, phases, machine, busy):
    """The measurements of all finished workloads, ready for JSON."""
    workloads = [summarize(each, sides[each], phases[each], machine) for each in sides]
    return {
        "versions": _versions() | _peer_versions(workloads),
        "machine": machine._asdict(),
        "busy_cores": busy,
        "workloads": workloads,
    }


def measure(workload: Workload, commands: Sequence[SideCommand], config: BenchmarkConfig) -> Sides:
    """One workload on all sides, as from `take_turns`; logs the medians on standard error."""
    _log(f"measuring {workload.name}")
    sides = take_turns(
        commands_for(commands, workload),
        workload,
        rounds=config.rounds,
        warmup=config.warmup,
        alternate=_alternates(),
    )
    medians = (f"{name} {np.median(side['seconds']):.3f} s" for name, side in sides.items())
    _log(f"  {', '.join(medians)}")
    return sides


def _alternates() -> bool:
    """Whether the sides run alternately: on a GPU each needs the memory for itself."""
    return jax.default_backend() == "cpu"


def _phases(workload: Workload, commands: Sequence[SideCommand]) -> dict[str, list[Phase]]:
    dtypes = dict.fromkeys(command.dtype for command in commands if command.name != "trl")
    return {dtype: phases_of(workload, dtype) for dtype in dtypes}


def _checks(config: BenchmarkConfig, workloads: Sequence[Workload]) -> dict[str, Any]:
    """The results of the checks, {"checks", "attention"}; None for a check that did not run."""
    results: dict[str, Any] = {"checks": None, "attention": None}
    if not config.check:
        return results
    _log("checking losses, gradients and samples against the plain path")
    plain = [in_float32(each) for each in workloads]
    results["checks"] = [each._asdict() for each in isolated(check.check_all, plain)]
    if any(each.ours.attention == "cudnn" for each in workloads):
        _log("checking cuDNN's attention against that of this library")
        results["attention"] = isolated(check_attention)._asdict()
    return results


def _commands(config: BenchmarkConfig) -> list[SideCommand]:
    """This library, then TRL, then this library in bfloat16."""
    commands, platform = [our_command("float32")], jax.default_backend()
    if config.peer.name == "trl":
        python = environment.peer_python(config.peer)
        if platform == "gpu":
            environment.check_cuda(python)
        commands.append(trl_command(python, config.peer.dtype, platform))
    if config.dtype != "float32":
        commands.append(our_command(config.dtype))
    return commands


def _description(config):
    """The date, the machine and the settings."""
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


def _peer_versions(workloads: list[dict[str, Any]]) -> dict[str, str]:
    """The versions of the packages in the process of TRL."""
    ready = (each["sides"].get("trl", {}).get("ready", {}) for each in workloads)
    versions: dict[str, str] = next((each["versions"] for each in ready if "versions" in each), {})
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
            "exists."
        )


def _check_model(path: str | None, workloads: Sequence[Workload]) -> None:
    """Raises an InputError if the folder holds another model than that of a workload."""
    if path is None:
        return
    using = [each for each in workloads if each.llama is not None]
    if not using:
        raise InputError(
            "model_path is for workloads of SmolLM2, and none was chosen; leave it out, or add "
            "sft_smollm2 to --workloads."
        )
    read = described_model(path).config
    for each in using:
        wanted = make_model(each).config
        for field in dataclasses.fields(wanted):
            values = [getattr(config, field.name, None) for config in (read, wanted)]
            if field.compare and not field.name.endswith("token_id") and values[0] != values[1]:
                raise InputError(
                    f"model_path {path} has {field.name} {values[0]}, but {each.name} needs "
                    f"{values[1]}; give the folder of SmolLM2-135M-Instruct."
                )


def _write(path: str | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}.") from error


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
