"""The roofline bound of a step: its FLOPs at the peak rate, its bytes at the bandwidth."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.runtime.compilation.flops import count_flops
from scripts.benchmark.programs import Program, abstract, make_program, without_remat
from scripts.benchmark.workloads import Workload, make_arrays


class Phase(NamedTuple):
    """A part of a step that ends before the next begins.

    Attributes:
      flops: of matrix products.
      moved: the least number of bytes read and written.
    """

    flops: float
    moved: float


def floor_seconds(phases: Sequence[Phase], peak: float, bandwidth: float) -> float:
    """A lower bound of the time of a step, in seconds.

        sum over phases of max(flops / peak, moved / bandwidth)

    FLOPs are those of the matrix products of a step without rematerialization, except for the
    attention weights, which are recomputed: one product in seven of attention.
    Bytes are those that no processor cache can save, without activations:

    - a generation reads all parameters for each token, and the keys and values of all previous
      positions, in the compute dtype;
    - an update reads and writes each trained parameter and both moments of Adam, and writes and
      reads the gradient: 8 float32 numbers per parameter. Frozen parameters are read once per step.

    PPO and GRPO have two phases, the generation and the rest.

    Args:
      phases: of the step.
      peak: FLOP/s.
      bandwidth: bytes/s.

    Williams et al. 2009, Roofline: an insightful visual performance model.

    >>> floor_seconds([Phase(4.0, 1.0), Phase(0.0, 6.0)], peak=2.0, bandwidth=3.0)
    4.0
    """
    return sum(max(phase.flops / peak, phase.moved / bandwidth) for phase in phases)


def phases_of(workload: Workload, dtype: str) -> list[Phase]:
    """The phases of the step of a workload, from abstract evaluation."""
    workload = without_remat(workload)
    program = _program(workload, dtype)
    shapes = abstract(program)
    flops = _flops(program, shapes)
    if workload.kind == "generate":
        return [Phase(flops, _generation_bytes(workload, shapes[0], dtype))]
    state, updates = shapes[0], 1
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
    if workload.kind not in ("ppo", "grpo"):
        return [Phase(flops, 4.0 * (8 * trained + frozen))]
    if workload.kind == "ppo":
        updates = workload.num_ppo_epochs * workload.num_mini_batches
    sampling = dataclasses.replace(workload, kind="generate")
    (generation,) = phases_of(sampling, dtype)
    rest = Phase(flops - generation.flops, 4.0 * (8 * trained * updates + frozen))
    return [generation, rest]


def _program(workload: Workload, dtype: str) -> Program:
    return make_program(workload, make_arrays(workload), dtype)


def _flops(program: Program, shapes: Any) -> int:
    return count_flops(jax.jit(program.step).trace(*shapes).jaxpr)


def _generation_bytes(workload: Workload, params: Any, dtype: str) -> float:
    """Bytes of a generation: one pass for the prompts, then one for each token but the last."""
    sizes, length = sum(leaf.size for leaf in jax.tree.leaves(params)), workload.response_length
    responses = workload.batch_size * (workload.num_generations or 1)
    position = 2 * workload.n_layer * workload.cached_width * responses
    positions = np.sum(workload.prompt_length + np.arange(1, length))
    return jnp.dtype(dtype).itemsize * float(sizes * length + position * positions)
