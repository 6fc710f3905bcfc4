"""Affine layers, whose gradients a CPU multiplies fast."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, get_abstract_mesh

from rlhf_jax.backend import is_on_one_cpu


class Dense(nn.Module):
    """x @ kernel + bias: [..., *features] of [..., D], with parameters [D, *features], [*features].

    Differentiable on one CPU in reverse mode only, as the model is by its attention anyway.

    Attributes:
      features: the axes of the result in the place of D.
      dtype: the compute dtype; parameters are float32.
      kernel_init: of f32[D, prod(features)]. The bias starts from 0.
      use_bias: whether there is a bias.
    """

    features: tuple[int, ...]
    dtype: str
    kernel_init: Callable[..., jax.Array]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self._init_kernel, x.shape[-1])
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), self.features, jnp.float32)
        arrays = jax.tree.map(lambda array: array.astype(self.dtype), (x, kernel, bias))
        # The rule serves no mesh with explicit or manual axes.
        fast = is_on_one_cpu() and set(get_abstract_mesh().axis_types) <= {AxisType.Auto}
        return (_affine if fast else _plain)(*arrays)

    def _init_kernel(self, key, width):
        flat = self.kernel_init(key, (width, math.prod(self.features)), jnp.float32)
        return flat.reshape(width, *self.features)


def _plain(x, kernel, bias):
    product = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return product if bias is None else product + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))


_affine = jax.custom_vjp(_plain)


def _forward(x, kernel, bias):
    return _plain(x, kernel, bias), (x, kernel, bias)


def _backward(saved, gradient):
    """The gradient of the kernel as x.T @ gradient, and of the bias as a product with ones.

    JAX's own is (gradient.T @ x).T, for which XLA reads both operands by columns: on a CPU it takes
    twice as long, and in bfloat16 three times.
    """
    x, kernel, bias = saved
    matrix = kernel.reshape(x.shape[-1], -1)
    inputs, gradients = x.reshape(-1, matrix.shape[0]), gradient.reshape(-1, matrix.shape[1])
    for_x = lax.dot_general(gradients, matrix, (((1,), (1,)), ((), ())))
    # The barriers keep XLA from merging the transposition with the product again.
    columns = with_layout_constraint(lax.optimization_barrier(inputs).T, Layout((0, 1)))
    for_kernel = _dot(lax.optimization_barrier(columns), gradients)
    for_bias = None
    if bias is not None:
        for_bias = _dot(jnp.ones((1, len(gradients)), x.dtype), gradients)
        for_bias = for_bias.reshape(bias.shape).astype(x.dtype)
    return for_x.reshape(x.shape), for_kernel.reshape(kernel.shape).astype(x.dtype), for_bias


_affine.defvjp(_forward, _backward)


def _dot(x, y):
    """Added up in float32 at least."""
    return lax.dot(x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
