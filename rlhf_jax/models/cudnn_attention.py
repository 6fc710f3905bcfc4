"""Attention by the fused kernels of cuDNN, on NVIDIA GPUs; the same as `attention.attend`.

JAX calls the kernels in `jax.nn.dot_product_attention`, whose other implementation, "xla", runs
everywhere and serves the tests.
"""

import re
from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.attention_mask import Past
from rlhf_jax.parallel.constraints import constrain_batch, constrain_heads

MAX_HEAD_WIDTH = 128
MIN_CAPABILITY = 8.0
# The names of JAX's primitives. The backward pass reads the output of the forward pass and log Z of
# each token.
FORWARD = "dot_product_attention_fwd_wrapper"
BACKWARD = "dot_product_attention_bwd_wrapper"


def attend_by_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    past: Past | None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attention.attend` for q in bfloat16 or float16.

    Products that a causal mask hides are not computed; all others are, and those not visible are
    masked by a bias [G * K, T, T] in the dtype of q. The kernel supports neither a past that
    several responses share, so that each gets a copy of it, nor a causal mask behind one.

    Args:
      q, k, v, visible, past: as of `attention.attend`.
      implementation: of `jax.nn.dot_product_attention`; "xla" accepts any dtype and device.

    Raises:
      InputError: there is no GPU that has the kernel.
    """
    if implementation == "cudnn":
        check_device("The attention cudnn")
    length, has_past = q.shape[3], past is not None
    if past is not None:
        k, v = (_behind(before, own) for before, own in zip(past[:2], (k, v), strict=True))
        seen = past.mask.astype(bool)[:, None, None]  # segments are nonzero on real tokens
        seen = jnp.broadcast_to(seen, (*visible.shape[:3], seen.shape[-1]))
        visible = jnp.concatenate([seen, visible], axis=-1)
    sees = jnp.any(visible, axis=-1)
    # A softmax over nothing is NaN: tokens that see nothing attend to all, and become 0 below.
    visible = _even(visible | ~sees[..., None], 2, 3)
    flat_q, flat_k, flat_v = (constrain_heads(_flat(_even(x, 3))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        flat_q,
        flat_k,
        flat_v,
        mask=constrain_batch(visible.reshape(-1, 1, *visible.shape[2:])),
        scale=1.0,
        is_causal=not has_past,
        implementation=implementation,
    )
    out = jnp.swapaxes(out, 1, 2).reshape(*q.shape[:3], -1, q.shape[-1])[..., :length, :]
    return jnp.where(sees[:, :, None, :, None], out, 0)


def _behind(past, own):
    """[G, K, Hk, P + T, d]: keys or values of each response behind those of its group."""
    past = jnp.broadcast_to(past[:, None], (*own.shape[:3], *past.shape[-2:]))
    return jnp.concatenate([past, own], axis=3)


def _even(x, *axes):
    """The array with zeros behind odd axes, for which the kernel has no gradient under a mask."""
    return jnp.pad(x, [(0, size % 2 if axis in axes else 0) for axis, size in enumerate(x.shape)])


def _flat(x):
    """[G * K, T, H, d] of [G, K, H, T, d]."""
    return jnp.swapaxes(x, 2, 3).reshape(-1, x.shape[3], x.shape[2], x.shape[4])


def check_head_width(head_width: int) -> None:
    """Raises an InputError if cuDNN has no kernel for heads of that width."""
    if head_width > MAX_HEAD_WIDTH or head_width % 8:
        raise InputError(
            f"The attention cudnn needs heads whose width, n_embd / n_head, is a multiple of 8 and "
            f"at most {MAX_HEAD_WIDTH}, but it is {head_width}; set model.attention to blocks."
        )


def check_dropout(attention: str, attn_pdrop: float) -> None:
    """Raises an InputError for dropout of attention weights that are never in memory."""
    if attention == "cudnn" and attn_pdrop:
        raise InputError(
            "The attention cudnn drops no weights, but the model has attn_pdrop = "
            f"{attn_pdrop}; train without dropout (sft.dropout false), or set model.attention to "
            "blocks."
        )


def check_device(name: str) -> None:
    """Raises an InputError that begins with `name` unless the devices can run cuDNN's kernel.

    Compute capability 8.0 is the Ampere generation, with bfloat16.
    """
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not re.fullmatch(r"\d+\.\d+", capability):
        raise InputError(
            f"{name} needs an NVIDIA GPU, but JAX runs on {device.device_kind}; set "
            "model.attention to blocks, or install jax for CUDA."
        )
    if float(capability) < MIN_CAPABILITY:
        raise InputError(
            f"{name} needs an NVIDIA GPU of compute capability {MIN_CAPABILITY} or more, but "
            f"{device.device_kind} has {capability}; set model.attention to blocks."
        )
