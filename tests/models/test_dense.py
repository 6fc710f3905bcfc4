"""Affine layers beside sums by NumPy, and how their gradients are multiplied on a CPU."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import dense
from rlhf_jax.models.dense import Dense

NORMAL = nn.initializers.normal(0.5)


def make(features, dtype="float32", shape=(2, 5, 3)):
    """(layer, parameters with a bias, inputs, factors of the result)."""
    layer = Dense(features, dtype, NORMAL)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], shape)
    params = layer.init(keys[1], x)["params"]
    params["bias"] = jax.random.normal(keys[2], features)
    return layer, params, x, jax.random.normal(keys[3], (*shape[:-1], *features))


def gradients(layer, params, x, weights):
    """Of the weighted sum of the results, for the parameters and for the inputs."""

    def total(params, x):
        return jnp.sum(layer.apply({"params": params}, x).astype(jnp.float32) * weights)

    return jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)


@pytest.mark.parametrize("features", [(4,), (3, 4)])
def test_results_and_gradients_are_those_of_a_loop(features):
    layer, params, x, weights = make(features)
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    inputs, factors = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    expected = np.zeros(factors.shape)
    for_x, for_kernel, for_bias = (np.zeros(array.shape) for array in (inputs, kernel, bias))
    for at in np.ndindex(inputs.shape[:-1]):
        expected[at] = bias
        for_bias += factors[at]
        for i, entry in enumerate(inputs[at]):
            expected[at] += entry * kernel[i]
            for_kernel[i] += entry * factors[at]
            for_x[at][i] = np.sum(kernel[i] * factors[at])
    result = layer.apply({"params": params}, x)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    actual, found_x = gradients(layer, params, x, weights)
    np.testing.assert_allclose(actual["kernel"], for_kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual["bias"], for_bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_x, for_x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_one_cpu_computes_as_other_devices_do(monkeypatch, dtype, tolerance):
    made = make((3, 8), dtype, (2, 16, 8))
    here = gradients(*made), made[0].apply({"params": made[1]}, made[2])
    monkeypatch.setattr(dense, "can_set_layouts", lambda: False)
    there = gradients(*made), made[0].apply({"params": made[1]}, made[2])
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=4 * tolerance
        )
    assert here[1].dtype == dtype


def test_parameters_start_as_those_of_flax():
    layer, x = Dense((3, 4), "float32", NORMAL), jnp.ones((2, 5))
    theirs = nn.DenseGeneral((3, 4), kernel_init=NORMAL).init(jax.random.key(7), x)
    jax.tree.map(np.testing.assert_array_equal, layer.init(jax.random.key(7), x), theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_layers_of_several_seeds_are_mapped(dtype, tolerance):
    layer, params, x, weights = make((4,), dtype)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    actual = jax.vmap(lambda params: gradients(layer, params, x, weights))(several)
    for i in range(2):
        alone = gradients(layer, jax.tree.map(lambda leaf, i=i: leaf[i], several), x, weights)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_of_one_device_changes_nothing(kind):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    layer, params, x, weights = make((3, 4))
    expected = gradients(layer, params, x, weights)[1]

    def total(x, weights):
        return jnp.sum(layer.apply({"params": params}, x) * weights)

    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P("data"))
        actual = jax.grad(total)(jax.device_put(x, split), jax.device_put(weights, split))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_shards_of_a_shard_map_add_up():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layer, params, x, weights = make((3, 4))

    @jax.shard_map(mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P("data")), out_specs=jax.P())
    def total(params, x, weights):
        return jax.lax.psum(jnp.sum(layer.apply({"params": params}, x) * weights), "data")

    actual = jax.jit(jax.grad(total, argnums=(0, 1)))(params, x, weights)
    expected = gradients(layer, params, x, weights)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_float64_stays_so_and_parameters_are_float32():
    with jax.enable_x64(True):
        layer, params, x, weights = make((4,), "float64")
        assert {leaf.dtype for leaf in jax.tree.leaves(layer.init(jax.random.key(0), x))} == {
            jnp.dtype("float32")
        }
        params, x, weights = jax.tree.map(lambda leaf: leaf.astype("float64"), (params, x, weights))

        def total(params):
            return jnp.sum(layer.apply({"params": params}, x) * weights)

        actual = jax.grad(total)(params)["kernel"]
        np.testing.assert_allclose(actual, np.einsum("btd,btf->df", x, weights), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_product_of_gradients_goes_by_columns(dtype):
    """One that contracts the first axis of its left operand takes twice as long, or longer."""
    layer, params, x, weights = make((64,), dtype, (4, 64, 128))

    def total(params, x):
        return jnp.sum(layer.apply({"params": params}, jnp.tanh(x)).astype(jnp.float32) * weights)

    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(params, x).compile().as_text()
    contracted = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d)\}", text)
    assert len(contracted) >= 2
    assert set(contracted) == {"1"}
