"""Affine layers, whose gradients a CPU multiplies fast, with a low-rank adapter where there is one.

Beside `kernel` [D, *features] the parameters of a layer may hold, of a frozen kernel,

    kernel_scale      f32[*features]: the kernel is int8, and this times it
    lora_a, lora_b    [D, r] and [r, *features], A and B of the adapter
    lora_scale        f32[]: alpha / r, or alpha / sqrt(r)
    lora_dropout      f32[]: the rate at which its inputs are dropped where there is a key
    lora_start_a, lora_start_b
                      A and B before training, whose product is taken off (PiSSA)
    lora_magnitude    f32[*features]: the norms of the columns (DoRA)

    V = W + scale * (A B - A0 B0),      y = x V + bias, or with DoRA x (m * V / |V|) + bias

in which |V|, the norm over D, has no gradient. A kernel without an adapter costs what it did.

Hu et al. 2021, LoRA, section 4.1 (arXiv:2106.09685); Meng et al. 2024, PiSSA, eq. 2 to 5
(arXiv:2404.02948); Liu et al. 2024, DoRA, eq. 5 and section 4.3 (arXiv:2402.09353).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rlhf_jax.backend import can_set_layouts, transposed_copy
from rlhf_jax.models.dropout import drop, traced_dropout
from rlhf_jax.parallel.partition import Rules

ADAPTED = "adapted"  # the name of sums of products, which the backward pass keeps in their place
BESIDE_KERNEL = (
    "kernel_scale",
    "lora_a",
    "lora_b",
    "lora_scale",
    "lora_dropout",
    "lora_start_a",
    "lora_start_b",
    "lora_magnitude",
)

# The same by the way in which they are split.
_OF_INPUT, _OF_OUTPUT = r"lora_(start_)?a", r"lora_(start_)?b"
_REPLICATED = "kernel_scale|lora_(scale|dropout|magnitude)"

Parts = dict[str, jax.Array]  # "kernel" and arrays beside it


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
        x, bias = jax.tree.map(lambda array: array.astype(self.dtype), (x, bias))
        names = [name for name in BESIDE_KERNEL if self.has_variable("params", name)]
        if not names:
            return _product()(x, kernel.astype(self.dtype), bias)
        parts: Parts = {name: self.get_variable("params", name) for name in names}
        dropped = x
        if "lora_dropout" in parts and self.has_rng("dropout"):
            dropped = drop(traced_dropout(self.make_rng("dropout"), parts["lora_dropout"]), x)
        y = _adapted(x, dropped, {"kernel": kernel, **parts})
        return y if bias is None else y + bias

    def _init_kernel(self, key, width):
        flat = self.kernel_init(key, (width, math.prod(self.features)), jnp.float32)
        return flat.reshape(width, *self.features)


def rules_beside_kernels(rules: Rules) -> Rules:
    """Partition rules of the arrays beside the stacked kernels [N, D, *features] of some rules.

    A is split as the input of its kernel, [N, D, r], and B as its outputs, [N, r, *features];
    scales and magnitudes are replicated.
    """
    beside: list[tuple[str, PartitionSpec]] = [(_REPLICATED, PartitionSpec())]
    for pattern, spec in rules:
        if "kernel" in pattern:
            axes: list[Any] = [*spec, *[None] * (2 - len(spec))]
            layers, width, *features = axes
            of_input, of_output = (pattern.replace("kernel", a) for a in (_OF_INPUT, _OF_OUTPUT))
            beside.append((of_input, PartitionSpec(layers, width, None)))
            beside.append((of_output, PartitionSpec(layers, None, *features)))
    return tuple(beside)


def effective_kernel(parts: Parts) -> jax.Array:
    """f32[D, *features]: the kernel under which a layer without an adapter returns the same.

    Args:
      parts: of one layer, without the axis of layers.
    """
    kernel = parts["kernel"].astype(jnp.float32)
    if "kernel_scale" in parts:
        kernel *= parts["kernel_scale"]
    kernel += adapter_product(parts)
    if "lora_magnitude" in parts:
        kernel *= parts["lora_magnitude"] / column_norms(kernel)
    return kernel


def adapter_product(parts: Parts) -> jax.Array:
    """scale * (A B - A0 B0), f32[D, *features], or 0 without an adapter."""
    if "lora_a" not in parts:
        return jnp.zeros(())
    a, b = (each.astype(jnp.float32) for each in low_rank(parts))
    product = jnp.tensordot(a, b, 1, precision=lax.Precision.HIGHEST)
    return parts["lora_scale"] * product


def low_rank(parts: Parts) -> tuple[jax.Array, jax.Array]:
    """(A, B), or ([A, A0], [B, -B0]), whose product is A B - A0 B0."""
    a, b = parts["lora_a"], parts["lora_b"]
    if "lora_start_a" not in parts:
        return a, b
    start_a, start_b = parts["lora_start_a"], -parts["lora_start_b"]
    return jnp.concatenate([a, start_a], axis=1), jnp.concatenate([b, start_b])


def column_norms(kernel: jax.Array) -> jax.Array:
    """f32[*features]: the norms of a kernel [D, *features] over D."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0))


def _adapted(x, dropped, parts):
    """The product with the frozen kernel and with its adapter, without a bias."""
    # Not `_affine`: the kernel has no gradient.
    y = _plain(x, parts["kernel"].astype(x.dtype), None)
    if "kernel_scale" in parts:
        y = (y * parts["kernel_scale"]).astype(x.dtype)
    if "lora_a" not in parts:
        return y
    a, b = (each.astype(x.dtype) for each in low_rank(parts))
    product = _product()
    low = (product(dropped, a, None) * parts["lora_scale"]).astype(x.dtype)
    y = y + product(low, b, None)
    if "lora_magnitude" in parts:
        kernel = parts["kernel"].astype(jnp.float32) + adapter_product(parts)
        norms = lax.stop_gradient(column_norms(kernel))
        y = (y * (parts["lora_magnitude"] / norms)).astype(x.dtype)
    return checkpoint_name(y, ADAPTED)


def _product():
    """x @ kernel + bias by the fastest gradients."""
    return _affine if can_set_layouts() else _plain


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
    for_kernel = _dot(transposed_copy(inputs), gradients)
    for_bias = None
    if bias is not None:
        for_bias = _dot(jnp.ones((1, len(gradients)), x.dtype), gradients)
        for_bias = for_bias.reshape(bias.shape).astype(x.dtype)
    return for_x.reshape(x.shape), for_kernel.reshape(kernel.shape).astype(x.dtype), for_bias


_affine.defvjp(_forward, _backward)


def _dot(x, y):
    """Added up in float32 at least."""
    return lax.dot(x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
