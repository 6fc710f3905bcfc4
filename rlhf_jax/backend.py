"""The platform: the devices that a program is traced for, compiler options, and memory."""

import ctypes
import sys

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, get_abstract_mesh

# By default XLA orders a step on a CPU so that most of it could run at once, and keeps the arrays
# which that needs. Its products use all cores anyway.
_LESS_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compiler_options(platform: str) -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for a step: on a CPU it takes up to two fifths less memory.

    Args:
      platform: of the devices, such as `jax.default_backend()`.
    """
    return _LESS_MEMORY if platform == "cpu" else None


def is_on_cpu() -> bool:
    """Whether the traced program is for CPUs: the devices of the mesh, if one is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "cpu"
    device = mesh.abstract_device  # None where it is not known yet
    return device is not None and device.device_kind == "cpu"


def is_on_one_cpu() -> bool:
    """Whether the traced program is for one CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    return is_on_cpu() and (mesh.empty or mesh.size == 1)


def can_set_layouts() -> bool:
    """Whether `transposed_copy` may be used: on one CPU, under a mesh with automatic axes only.

    A layout cannot be set under a mesh with explicit or manual axes.
    """
    return is_on_one_cpu() and set(get_abstract_mesh().axis_types) <= {AxisType.Auto}


def transposed_copy(x: jax.Array) -> jax.Array:
    """[..., n, m] of [..., m, n], copied, so that a product reads it contiguously.

    Barriers keep XLA from merging the transposition with the product, which is slower on a CPU:
    see docs/performance.md.
    """
    turned = jnp.swapaxes(jax.lax.optimization_barrier(x), -1, -2)
    copied = with_layout_constraint(turned, Layout(tuple(range(x.ndim))))
    return jax.lax.optimization_barrier(copied)


def trim_heap() -> bool:
    """Returns freed memory to the operating system; False if the C library cannot.

    A compilation leaves hundreds of megabytes that glibc keeps, and that training does not need.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
