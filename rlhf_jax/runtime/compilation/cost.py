"""Memory and FLOPs of a stage on each device, by the compiler's analysis and the jaxpr."""

import re
from typing import Any

import jax

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import described_model, fresh_model
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.runtime.compilation.ahead import Program, programs
from rlhf_jax.runtime.compilation.flops import count_flops
from rlhf_jax.runtime.compilation.topologies import find_devices
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.loading import compute_dtype
from rlhf_jax.runtime.program import held_bytes
from rlhf_jax.runtime.run.progress import peak_flops


def stage_cost(
    config: RunConfig,
    topology: str,
    *,
    model_name: str | None = None,
    num_responses: int = 4,
) -> dict[str, Any]:
    """The cost of each program of a stage, for JSON: `program_cost` of each in "programs".

    Args:
      topology: as for `find_devices`.
      model_name: one of `named_sizes`, a folder with a config.json, or such a file; by default
        `model.path`, and if that is null too, a fresh model of the settings.
      num_responses: as for `programs`.

    Raises:
      InputError: there is no such topology or model, or the mesh or a batch does not fit it.
    """
    devices = find_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    dtype = _dtype(config, devices[0])
    model = _find_model(model_name, config, dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with jax.set_mesh(mesh):
        steps = programs(config, model, mesh, num_responses=num_responses)
        costs = [program_cost(program, devices) for program in steps]
    return {
        "stage": config.trainer.name,
        "model": model_name or config.model.path,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        "dtype": dtype,
        "topology": topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "programs": costs,
    }


def _dtype(config: RunConfig, device: jax.Device) -> str:
    if config.model.attention == "cudnn":
        raise InputError(
            "model.attention cudnn is of NVIDIA GPUs, which no topology has; leave it at blocks."
        )
    is_auto = device.platform == "tpu" and config.model.dtype == "auto"
    return "bfloat16" if is_auto else compute_dtype(config.model.dtype)


def _find_model(name: str | None, config: RunConfig, dtype: str) -> Model:
    name = name or config.model.path
    if name is None:
        return fresh_model(config.model, vocab_size=config.tokenizer.vocab_size, dtype=dtype)
    name = name.removeprefix("openai-community/")
    return described_model(name, dtype=dtype, remat=config.model.remat)


def program_cost(program: Program, devices: list[jax.Device]) -> dict[str, Any]:
    """Compiles a program, under `jax.set_mesh` of its mesh, for its cost on one device.

    Returns:
      name: of the program.
      flops: of products, an equal share of all devices'.
      seconds: that these take at least, at the published peak of the device, where it is known.
      fits: False where the compiler finds that the device has too little memory; of the following
        keys it then has only "needed" and "available", in the compiler's words.
      arguments, outputs, temporaries: bytes, by `memory_analysis`: of all arguments, of all
        results, and of all other arrays.
      peak: bytes that are held at one time at most, with all of the state, also the part that the
        program does not read.
    """
    traced = program.function.trace(*program.arguments)
    flops = count_flops(traced.jaxpr) / len(devices)
    cost: dict[str, Any] = {"name": program.name, "flops": flops}
    if (peak := peak_flops(devices[0])) is not None:
        cost["seconds"] = flops / peak
    try:
        memory = traced.lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return cost | {"fits": False} | _memory_sizes(error)
    return cost | {
        "fits": True,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": held_bytes(memory, program.state_bytes, devices[0].platform),
    }


def _memory_sizes(error: Exception) -> dict[str, str]:
    """The memory that XLA needs and has if it is exhausted; raises any other error."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        raise error
    pattern = r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)|"
    pattern += r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?)"
    match = re.search(pattern, message)
    needed, available = filter(None, match.groups()) if match else ("more", "there is")
    return {"needed": needed, "available": available}


def as_text(numbers: dict[str, Any]) -> str:
    """The numbers of `stage_cost`, for a terminal."""
    mesh = " x ".join(f"{name} {size}" for name, size in numbers["mesh"].items())
    model = f" of {numbers['model']}" if numbers["model"] else ""
    lines = [
        f"{numbers['stage']}{model} ({numbers['parameters']:.4g} parameters, "
        f"{numbers['dtype']}) on {numbers['topology']}: {numbers['devices']} devices "
        f"({numbers['device_kind']}), mesh {mesh}",
        "All numbers are of one device, by the analysis of the compiled programs.",
    ]
    for program in numbers["programs"]:
        lines += ["", *_program_lines(program)]
    return "\n".join(lines)


def _program_lines(program: dict[str, Any]) -> list[str]:
    flops = f"  FLOPs of products   {program['flops']:.4g}"
    if "seconds" in program:
        flops += f", at least {program['seconds']:.4g} s"
    if "needed" in program:
        needed = f"needs {program['needed']} bytes of memory, and has {program['available']}"
        return [f"{program['name']}: does not fit. The compiler {needed}.", flops]
    return [
        f"{program['name']}:",
        f"  state and batch     {_size(program['arguments'])}",
        f"  held at most        {_size(program['peak'])}",
        flops,
    ]


def _size(size: float) -> str:
    """A number of bytes in powers of 1024."""
    for exponent, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 2**exponent:
            return f"{size / 2**exponent:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"
