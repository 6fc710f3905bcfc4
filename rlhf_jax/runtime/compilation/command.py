"""Compiling a stage for devices that are not there, and telling what it would cost on them."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import named_sizes
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.runtime.commands import pipeline
from rlhf_jax.runtime.compilation.ahead import StageConfig, programs
from rlhf_jax.runtime.compilation.collectives import KINDS
from rlhf_jax.runtime.compilation.measure import Cost, TooLarge, measure
from rlhf_jax.runtime.compilation.shapes import find_model
from rlhf_jax.runtime.compilation.topologies import KNOWN, Topology, find_topology
from rlhf_jax.runtime.config import (
    PPOConfig,
    RewardConfig,
    RLHFConfig,
    SFTConfig,
    parse,
    read_content,
)
from rlhf_jax.runtime.loading import compute_dtype
from rlhf_jax.runtime.run.folder import disk_errors

STAGES = ("sft", "reward", "ppo")
OF_CONFIGURATION = "of the configuration"
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_KINDS: dict[str, Any] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
_PARTS: dict[str, Any] = {
    "sft": pipeline.sft_config,
    "reward": pipeline.reward_config,
    "ppo": pipeline.ppo_config,
}


def run_compile_for(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command `compile_for.py`: prints what a stage would cost, and returns the numbers.

    Args:
      argv: `--topology NAME [--model NAME] [--stage NAME] [--num_responses K]
        [--learned_tokens K] [--json FILE] --config FILE.yaml --section.key value ...`.

    Raises:
      InputError: one sentence about what is wrong with the flags, the configuration or the mesh.
    """
    flags, rest = _flags().parse_known_args(sys.argv[1:] if argv is None else argv)
    if flags.topology is None:
        raise InputError(f"--topology is missing; give {KNOWN}.")
    stage, config = read_config(rest, flags.stage)
    topology = find_topology(flags.topology)
    found = cost_of(
        stage,
        config,
        topology,
        model_name=flags.model,
        num_responses=flags.num_responses,
        learned_tokens=flags.learned_tokens,
    )
    print(as_text(found))
    if flags.json is not None:
        path = epath.Path(flags.json)
        with disk_errors(path):
            path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Compiles a stage for devices that are not there; settings are those of the "
        "stage's own command.",
    )
    add = parser.add_argument
    add("--topology", help=KNOWN)
    add(
        "--model",
        help=f"{', '.join(named_sizes())}, or a folder with a config.json; by default the "
        "model of the configuration",
    )
    add("--stage", help=f"{', '.join(STAGES)}; by default the one that the configuration has")
    add("--num_responses", type=int, default=4, help="responses to a prompt, of rankings")
    add(
        "--learned_tokens",
        type=int,
        help="at most so many of a row of texts; by default those of the greatest completions",
    )
    add("--json", help="a file for the numbers")
    return parser


def read_config(argv: Sequence[str], stage: str | None) -> tuple[str, StageConfig]:
    """The stage, and its configuration, of `--config FILE.yaml --section.key value ...`.

    A file of `run_rlhf.py` has several stages, of which `stage` chooses one.

    Raises:
      InputError: the stage is not told, or what `config.parse` says.
    """
    sections = _sections(argv)
    named = [name for name in STAGES if name in sections]
    parts = sections.get("data"), sections.get("optimizer")
    is_whole = len(named) > 1 or any(isinstance(p, dict) and p.keys() & {*STAGES} for p in parts)
    if stage is None and len(named) == 1 and not is_whole:
        stage = named[0]
    if stage not in (*STAGES, None):
        raise InputError(f"--stage must be one of {', '.join(STAGES)}, but is {stage!r}.")
    if stage is None:
        raise InputError(
            "Which stage is to be compiled is not told by a section sft, reward or ppo alone; "
            f"give --stage {', '.join(STAGES[:-1])} or {STAGES[-1]}."
        )
    if is_whole:
        whole = parse(RLHFConfig, argv)
        # Later stages start from what earlier ones left, which has the form of the first model.
        return stage, dataclasses.replace(_PARTS[stage](whole), model=whole.model)
    return stage, parse(_KINDS[stage], argv)


def _sections(argv: Sequence[str]) -> dict[str, Any]:
    """The file's content with the sections of the flags; what else is wrong is said later."""
    content: dict[str, Any] = {}
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        if flag == "--config" or flag.startswith("--config="):
            path = flag.partition("=")[2] or value
            loaded = read_content(path)
            content |= loaded if isinstance(loaded, dict) else {}
        elif flag.startswith("--"):
            content.setdefault(flag[2:].partition(".")[0], None)
    return content


def cost_of(
    stage: str,
    config: StageConfig,
    topology: Topology,
    *,
    model_name: str | None = None,
    num_responses: int = 4,
    learned_tokens: int | None = None,
) -> dict[str, Any]:
    """What each program of a stage costs on each device of a topology, ready for JSON.

    Raises:
      InputError: no such model, or a mesh or batch that does not fit the topology.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    dtype: str = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if topology.is_tpu else compute_dtype("auto")
    if config.model.attention == "cudnn":
        raise InputError(
            "model.attention cudnn is of NVIDIA GPUs, which no topology has; leave it at blocks."
        )
    model = find_model(model_name, config.model, config.tokenizer, dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    found: dict[str, Any] = {
        "stage": stage,
        "model": model_name or config.model.path or OF_CONFIGURATION,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "dtype": dtype,
        "topology": topology.name,
        "devices": len(topology.devices),
        "device_kind": topology.devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "chip": topology.chip and topology.chip._asdict(),
        "programs": [],
    }
    with jax.set_mesh(mesh):
        steps = programs(
            config, model, mesh, num_responses=num_responses, learned_tokens=learned_tokens
        )
        for program in steps:
            cost = measure(program, len(topology.devices))
            found["programs"].append(_numbers(cost, topology))
    return found


def _numbers(cost: Cost | TooLarge, topology: Topology) -> dict[str, Any]:
    if isinstance(cost, TooLarge):
        return {"fits": False, **cost._asdict()}
    chip = topology.chip
    fits = chip is None or cost.peak + cost.unread <= chip.hbm
    numbers = {"fits": fits, **cost._asdict(), "received": cost.received}
    numbers["collectives"] = [{**each._asdict(), "total": each.total} for each in cost.collectives]
    if chip is not None:
        line = cost.roofline(chip)
        numbers["roofline"] = {**line._asdict(), "seconds": line.seconds, "bound": line.bound}
    return numbers


def as_text(found: dict[str, Any]) -> str:
    """The numbers for a terminal."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    model = found["model"]
    of = "" if model == OF_CONFIGURATION else f" of {model}"
    lines = [
        f"{found['stage']}{of} ({found['parameters']:.4g} parameters, "
        f"{found['dtype']}) on {found['topology']}: {found['devices']} devices "
        f"({found['device_kind']}), mesh {mesh}",
        "Compiled, not run. All numbers are of one device.",
    ]
    for program in found["programs"]:
        lines += ["", *_program_lines(program, found["chip"])]
    return "\n".join(lines)


def _program_lines(program: dict[str, Any], chip: dict[str, Any] | None) -> list[str]:
    if "needed" in program:
        return [
            f"{program['name']}: does not fit. The compiler needs {program['needed']} bytes of "
            f"memory, and has {program['available']}.",
            f"  FLOPs of products   {program['flops']:.4g}",
        ]
    room = f" of {_gib(chip['hbm'])}" if chip else ""
    fits = "fits." if program["fits"] else "does not fit beside the state."
    lines = [f"{program['name']}: {fits}" if chip else f"{program['name']}:"]
    beside = f", beside {_gib(program['unread'])} of state" if program["unread"] else ""
    lines += [
        f"  {'state and batch':<20}{_gib(program['arguments'])}",
        f"  {'held at most':<20}{_gib(program['peak'])}{room}{beside}",
        f"  {'FLOPs of products':<20}{program['flops']:.4g}",
        f"  {'memory read, written':<20} {program['moved'] / 1e9:.4g} GB",
        f"  {'received':<20}{program['received'] / 1e9:.4g} GB",
        *_collective_lines(program["collectives"]),
        *(f"  {warning}" for warning in program["warnings"][:3]),
    ]
    if "roofline" in program:
        line = program["roofline"]
        parts = ", ".join(f"{n} {line[n]:.4g} s" for n in ("compute", "memory", "network"))
        lines.append(f"  at least {line['seconds']:.4g} s, bound by {line['bound']} ({parts})")
    return lines


def _collective_lines(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for kind in KINDS:
        of_kind = [each for each in found if each["kind"] == kind]
        if of_kind:
            count, total = sum(e["times"] for e in of_kind), sum(e["total"] for e in of_kind)
            lines.append(f"    {kind:<20}{count:>7} times {total / 1e9:>9.4g} GB; the largest:")
        for each in of_kind[:3]:
            shape = each["shape"] if len(each["shape"]) < 50 else each["shape"][:46] + " ..."
            lines.append(
                f"      {shape} among {each['group']}, {each['times']} times, "
                f"{each['total'] / 1e9:.4g} GB"
            )
    return lines


def _gib(size: float) -> str:
    """A number of bytes, in the unit of its size."""
    unit = next((u for u in ("GiB", "MiB") if size >= _UNITS[u]), "KiB")
    return f"{size / _UNITS[unit]:.3g} {unit}"


def use_no_accelerator(argv: Sequence[str]) -> None:
    """Sets up JAX, before it is used, for a topology: only `local` asks for what is here."""
    place = argv.index("--topology") + 1 if "--topology" in argv else len(argv)
    name = argv[place] if place < len(argv) else ""
    name = next((a.partition("=")[2] for a in argv if a.startswith("--topology=")), name)
    if name == "local":
        return
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    if name.startswith("cpu:") and name[4:].isdecimal():
        jax.config.update("jax_num_cpu_devices", int(name[4:]))
