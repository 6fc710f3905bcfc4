"""Every function on eight CPU devices, with both kinds of mesh axes, compared to one device.

Started by test_sharding.py in a process of its own: the number of devices is fixed at start.
"""

import os

if __name__ == "__main__":  # and not when it is looked through for doctests
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax import functional
from rlhf_jax.functional import linear
from tests.functional.case import SHARED, function_name, total_of
from tests.functional.cases import make_cases

LOGITS = ("logits", "ref_logits")


def spec_of(name, x):
    """The batch sharded over four devices, and the vocabulary over two."""
    if name == "unembedding":
        return PartitionSpec("tensor")
    if name in SHARED or x.ndim == 0:
        return PartitionSpec()
    return PartitionSpec("fsdp", None, "tensor") if name in LOGITS else PartitionSpec("fsdp")


def with_even_vocabulary(name, x):
    """Eight tokens instead of seven."""
    if name in LOGITS:
        return np.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=-1.0)
    return np.pad(x, ((0, 1), (0, 0))) if name == "unembedding" else x


def outputs(name, case, arrays):
    """The function's outputs and the gradients of the first."""
    function, keywords = (
        getattr(functional, function_name(name)),
        {**case.options, **case.coefficients},
    )

    def total(differentiable):
        output = function(**{**arrays, **differentiable}, **keywords)
        return total_of(output), output

    if not case.differentiable:
        return total({})[1]
    differentiable = {key: arrays[key] for key in case.differentiable}
    return jax.value_and_grad(total, has_aux=True)(differentiable)


def compiled_outputs(cases, arrays):
    """The outputs of these cases, by name, in one program."""
    return jax.jit(
        lambda arrays: {name: outputs(name, cases[name], arrays[name]) for name in arrays}
    )(arrays)


def main():
    cases = make_cases(0)
    arrays = {
        name: {key: with_even_vocabulary(key, x) for key, x in case.arrays.items()}
        for name, case in cases.items()
    }
    expected = compiled_outputs(cases, arrays)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
        for name, each in arrays.items():
            with jax.set_mesh(mesh):
                sharded = {
                    key: jax.device_put(x, NamedSharding(mesh, spec_of(key, x)))
                    for key, x in each.items()
                }
                # Alone: many collectives at once can exhaust the threads of a small machine.
                actual = compiled_outputs(cases, {name: sharded})
            pairs = zip(*map(jax.tree.leaves, (expected[name], actual[name])), strict=True)
            for one, eight in pairs:
                np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6, err_msg=name)
        sys.stdout.write(f"{axis_type.name} equal\n")
    linear_logprobs_by_hand()
    sys.stdout.write("shard_map equal\n")


def linear_logprobs_by_hand():
    """`linear_token_logprobs` inside `shard_map`, and how much it makes at a time there."""
    mesh = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(8, 6, 5)), rng.normal(size=(7, 5))
    arrays = (hidden.astype(np.float32), unembedding.astype(np.float32), rng.integers(0, 7, (8, 6)))
    for chunk_size in (None, 4):

        def total(hidden, unembedding, tokens, chunk_size=chunk_size):
            outputs = functional.linear_token_logprobs(
                hidden, unembedding, tokens, temperature=0.7, chunk_size=chunk_size
            )
            return sum(x.sum() for x in outputs)

        def of_all(*arrays, total=total):
            return jax.lax.psum(total(*arrays), "examples")

        examples, full = PartitionSpec("examples"), PartitionSpec()
        split = jax.shard_map(
            jax.value_and_grad(of_all, (0, 1)),
            mesh=mesh,
            in_specs=(examples, full, examples),
            out_specs=(full, (examples, full)),
        )
        expected = jax.value_and_grad(total, (0, 1))(*arrays)
        for function in (split, jax.jit(split)):
            for one, eight in zip(
                jax.tree.leaves(expected), jax.tree.leaves(function(*arrays)), strict=True
            ):
                np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
    sizes = []
    gpt2 = (8, 1024, 50257)
    with jax.set_mesh(mesh):
        sizes.append(linear.positions_per_chunk(*gpt2))
        jax.shard_map(
            lambda: sizes.append(linear.positions_per_chunk(*gpt2)), in_specs=(), out_specs=None
        )()
    assert sizes == [512, 83], sizes


if __name__ == "__main__":
    main()
