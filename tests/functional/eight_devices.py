"""Every function on eight CPU devices, with both kinds of mesh axes; prints what differs from one.

Started by test_sharding.py in a process of its own: the number of devices is fixed at start.
"""

import os

if __name__ == "__main__":  # and not when it is looked through for doctests
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax import functional
from tests.functional.cases import SHARED, function_name, make_cases


def spec_of(name, x):
    """Rows split over four devices, and the vocabulary over two."""
    if name in SHARED:
        return PartitionSpec("tensor")
    if x.ndim == 0:
        return PartitionSpec()
    return PartitionSpec("fsdp", None, "tensor") if name == "logits" else PartitionSpec("fsdp")


def with_even_vocabulary(name, x):
    """Eight tokens instead of seven."""
    if name == "logits":
        return np.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=-1.0)
    return np.pad(x, ((0, 1), (0, 0))) if name in SHARED else x


def outputs(name, case, arrays):
    """The function's outputs and the gradients of the first."""
    function, keywords = (
        getattr(functional, function_name(name)),
        {**case.options, **case.coefficients},
    )

    def total(differentiable):
        output = function(**{**arrays, **differentiable}, **keywords)
        first = output[0] if isinstance(output, tuple) else output
        return first.sum(), output

    if not case.differentiable:
        return jax.jit(lambda: total({})[1])()
    differentiable = {key: arrays[key] for key in case.differentiable}
    return jax.jit(jax.value_and_grad(total, has_aux=True))(differentiable)


def main():
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
        for name, case in make_cases(0).items():
            arrays = {key: with_even_vocabulary(key, x) for key, x in case.arrays.items()}
            expected = outputs(name, case, arrays)
            with jax.set_mesh(mesh):
                split = {
                    key: jax.device_put(x, NamedSharding(mesh, spec_of(key, x)))
                    for key, x in arrays.items()
                }
                actual = outputs(name, case, split)
            for one, eight in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
                np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6, err_msg=name)
        sys.stdout.write(f"{axis_type.name} equal\n")


if __name__ == "__main__":
    main()
