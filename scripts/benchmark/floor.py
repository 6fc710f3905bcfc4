"""What a step cannot beat: its FLOPs at the machine's peak, its bytes at its bandwidth."""

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
    """One part of a step, which ends before the next begins.

    Attributes:
      flops: of products.
      moved: bytes that are read or written at least.
    """

    flops: float
    moved: float


def floor_seconds(phases: Sequence[Phase], peak: float, bandwidth: float) -> float:
    """The least seconds of a step.

        sum over phases of max(flops / peak, moved / bandwidth)

    FLOPs are those of the products of our step, without what a rematerialization computes again
    but for the weights of attention, of which one product in seven is a second one.
    Bytes are those that no cache of a processor can save, activations left out:

    - a generation reads, for each of its tokens, all parameters, and the keys and values of all
      positions before it, in the compute dtype;
    - an update reads and writes each trained parameter and both of Adam's moments, and writes and
      reads the gradient: 8 float32 numbers a parameter; what is frozen is read once a step.

    PPO is a generation, and then all else.

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
    """The phases of a workload's step, from shapes alone."""
    workload = without_remat(workload)
    program = _program(workload, dtype)
    shapes = abstract(program)
    flops = _flops(program, shapes)
    if workload.kind == "generate":
        return [Phase(flops, _generation_bytes(workload, shapes[0], dtype))]
    state, updates = shapes[0], 1
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
    if workload.kind != "ppo":
        return [Phase(flops, 4.0 * (8 * trained + frozen))]
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
    """Of all steps of a generation: the prompts' first, then one for each token but the last."""
    sizes, length = sum(leaf.size for leaf in jax.tree.leaves(params)), workload.response_length
    position = 2 * workload.n_layer * workload.n_embd * workload.batch_size
    positions = np.sum(workload.prompt_length + np.arange(1, length))
    return jnp.dtype(dtype).itemsize * float(sizes * length + position * positions)
