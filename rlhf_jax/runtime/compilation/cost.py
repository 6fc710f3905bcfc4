"""The cost of a stage on each device: by the compiler's analyses, its HLO, and the jaxpr."""

import re
from typing import Any

import jax

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import described_model, fresh_model
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.runtime.compilation.ahead import Program, programs
from rlhf_jax.runtime.compilation.chips import least_seconds
from rlhf_jax.runtime.compilation.collectives import collectives
from rlhf_jax.runtime.compilation.flops import count_flops, count_stacked_bytes
from rlhf_jax.runtime.compilation.topologies import Topology, captured_stderr
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.loading import compute_dtype

OF_CONFIGURATION = "of the configuration"


def stage_cost(
    config: RunConfig,
    topology: Topology,
    *,
    model_name: str | None = None,
    num_responses: int = 4,
    target_tokens: int | None = None,
) -> dict[str, Any]:
    """The cost of each program of a stage, for JSON: `program_cost` of each in "programs".

    Args:
      model_name: one of `named_sizes`, a folder with a config.json, or such a file; by default
        `model.path`, and if that is null too, a fresh model of the settings.
      num_responses, target_tokens: as for `programs`.

    Raises:
      InputError: there is no such model, or the mesh or a batch does not fit the topology.
    """
    mesh = make_mesh(config.mesh, topology.devices)
    model = _find_model(model_name, config, _dtype(config, topology))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with jax.set_mesh(mesh):
        steps = programs(
            config, model, mesh, num_responses=num_responses, target_tokens=target_tokens
        )
        costs = [program_cost(program, topology) for program in steps]
    return {
        "stage": config.trainer.name,
        "model": model_name or config.model.path or OF_CONFIGURATION,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "dtype": _dtype(config, topology),
        "topology": topology.name,
        "devices": len(topology.devices),
        "device_kind": topology.devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "chip": topology.chip and topology.chip._asdict(),
        "programs": costs,
    }


def _dtype(config: RunConfig, topology: Topology) -> str:
    if config.model.attention == "cudnn":
        raise InputError(
            "model.attention cudnn is of NVIDIA GPUs, which no topology has; leave it at blocks."
        )
    is_tpu = topology.chip is not None
    return (
        "bfloat16" if is_tpu and config.model.dtype == "auto" else compute_dtype(config.model.dtype)
    )


def _find_model(name: str | None, config: RunConfig, dtype: str) -> Model:
    name = name or config.model.path
    if name is None:
        return fresh_model(config.model, vocab_size=config.tokenizer.vocab_size, dtype=dtype)
    name = name.removeprefix("openai-community/")
    return described_model(name, dtype=dtype, remat=config.model.remat)


def program_cost(program: Program, topology: Topology) -> dict[str, Any]:
    """Compiles a program, under `jax.set_mesh` of its mesh, for its cost on one device.

    Returns:
      name: of the program.
      fits: whether the device has the memory; where the compiler finds too little, only "needed"
        and "available" in its words and "flops" follow.
      arguments, outputs, temporaries, peak: bytes, by `memory_analysis`: of all arguments, of all
        results, of all other arrays, and the most that is held at one time, arguments included.
      unread: bytes of the state that the program does not read, and that are held beside.
      flops: of products, an equal share of all devices'.
      moved: bytes read or written in memory, at least: arguments, outputs, and an equal share of
        `count_stacked_bytes`.
      received: bytes received from other devices.
      collectives: `Collective` as dicts.
      warnings: of the compiler, about arrays that it replicates first.
      seconds: on a TPU, `least_seconds`.
    """
    traced = program.function.trace(*program.arguments)
    count = len(topology.devices)
    flops, stacked = (f(traced.jaxpr) / count for f in (count_flops, count_stacked_bytes))
    cost: dict[str, Any] = {"name": program.name, "fits": False, "flops": flops}
    try:
        with captured_stderr() as lines:
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return cost | _memory_sizes(error)
    memory = compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    peak = arguments + outputs + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    found = collectives(compiled.as_text(), count)
    cost |= {
        "fits": True,
        "arguments": arguments,
        "outputs": outputs,
        "temporaries": memory.temp_size_in_bytes,
        "peak": peak if topology.chip is None else memory.peak_memory_in_bytes,
        "unread": max(0, program.state_bytes - arguments),
        "moved": arguments + outputs + stacked,
        "received": sum(each.total for each in found),
        "collectives": [each._asdict() for each in found],
        "warnings": _warnings(lines),
    }
    if topology.chip is not None:
        work = {name: cost[name] for name in ("flops", "moved", "received")}
        cost["fits"] = cost["peak"] + cost["unread"] <= topology.chip.hbm
        cost["seconds"] = least_seconds(topology.chip, **work)
    return cost


def _warnings(lines: list[str]) -> list[str]:
    """The compiler's warnings of arrays that it replicates on all devices first, each once."""
    found = (re.search(r"(Involuntary full rematerialization.*?)(\. As the|$)", x) for x in lines)
    return list(dict.fromkeys(match[1] for match in found if match))


def _memory_sizes(error: Exception) -> dict[str, str]:
    """What XLA says it needs and has if memory is exhausted; raises any other error."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        raise error
    pattern = r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)|"
    pattern += r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?)"
    found = re.search(pattern, message)
    needed, available = filter(None, found.groups()) if found else ("more", "there is")
    return {"needed": needed, "available": available}
