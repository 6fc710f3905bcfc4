"""Attention by the fused kernels of cuDNN, on NVIDIA GPUs: what `attention.attend` computes.

    out_t = sum_m w_tm v_m,     w_tm = exp(q_t . k_m) / sum_m exp(q_t . k_m)

over the m that t sees. JAX reaches the kernels through `jax.nn.dot_product_attention`, whose other
implementation, "xla", runs everywhere: the way there is tested with it.
"""

import re
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.attention import Past
from rlhf_jax.parallel.constraints import constrain_batch, constrain_heads

Attention = Literal["blocks", "cudnn"]

WIDEST_HEAD = 128
LEAST_CAPABILITY = 8.0
# The primitives as JAX names them. The backward pass reads what the forward one gave: what was
# attended, and log Z of each token.
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
    """Attention of K rows of T tokens in each of G groups, to themselves and to what went before.

    What a causal mask hides is not computed; all else is, and then hidden by a number that is
    added, [G * K, T, T] in the dtype of q. The kernel knows no past that several rows share, so
    that each row gets a copy of it, nor a causal mask behind one.

    Args:
      q, k, v: [G, K, H, T, d] in bfloat16 or float16; q is scaled already.
      visible: bool[G, K, T, T], whether token t sees token m of its row; never one behind it.
      past: of each group, seen by all its rows.
      implementation: of `jax.nn.dot_product_attention`; "xla" takes any dtype and device.

    Returns:
      [G, K, H, T, d] in the dtype of q; 0 where a token sees nothing.

    Raises:
      InputError: there is no GPU that has the kernel.
    """
    if implementation == "cudnn":
        check_device("The attention cudnn")
    length, has_past = q.shape[3], past is not None
    if past is not None:
        k, v = (_behind(before, own) for before, own in zip(past[:2], (k, v), strict=True))
        seen = past.mask.astype(bool)[:, None, None]  # segments too say what is real
        seen = jnp.broadcast_to(seen, (*visible.shape[:3], seen.shape[-1]))
        visible = jnp.concatenate([seen, visible], axis=-1)
    sees = jnp.any(visible, axis=-1)
    # A softmax over nothing is no number: what sees nothing looks at all, and is left out after.
    visible = _even(visible | ~sees[..., None], 2, 3)
    rows_q, rows_k, rows_v = (constrain_heads(_in_rows(_even(x, 3))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        rows_q,
        rows_k,
        rows_v,
        mask=constrain_batch(visible.reshape(-1, 1, *visible.shape[2:])),
        scale=1.0,
        is_causal=not has_past,
        implementation=implementation,
    )
    out = jnp.swapaxes(out, 1, 2).reshape(*q.shape[:3], -1, q.shape[-1])[..., :length, :]
    return jnp.where(sees[:, :, None, :, None], out, 0)


def _behind(past, own):
    """[G, K, H, P + T, d]: keys or values of each row, and before them those of its group."""
    past = jnp.broadcast_to(past[:, None], (*own.shape[:3], *past.shape[-2:]))
    return jnp.concatenate([past, own], axis=3)


def _even(x, *axes):
    """With zeros behind odd axes, of which the kernel has no gradient under a mask."""
    return jnp.pad(x, [(0, size % 2 if axis in axes else 0) for axis, size in enumerate(x.shape)])


def _in_rows(x):
    """[G * K, T, H, d] of [G, K, H, T, d]."""
    return jnp.swapaxes(x, 2, 3).reshape(-1, x.shape[3], x.shape[2], x.shape[4])


def check_attention(name: str, attention: str) -> None:
    """Raises an InputError that names the setting if there is no such attention."""
    if attention not in get_args(Attention):
        ways = ", ".join(get_args(Attention))
        raise InputError(f"{name} must be one of {ways}, but is {attention!r}.")


def check_dtype(dtype: str) -> None:
    """Raises an InputError if cuDNN has no kernel in that dtype."""
    if dtype not in ("bfloat16", "float16"):
        raise InputError(
            f"The attention cudnn needs the dtype bfloat16 or float16, but it is {dtype}; set "
            "model.dtype to bfloat16, or model.attention to blocks."
        )


def check_heads(head_width: int) -> None:
    """Raises an InputError if cuDNN has no kernel for heads of that width."""
    if head_width > WIDEST_HEAD or head_width % 8:
        raise InputError(
            f"The attention cudnn needs heads whose width, n_embd / n_head, is a multiple of 8 and "
            f"at most {WIDEST_HEAD}, but it is {head_width}; set model.attention to blocks."
        )


def check_dropout(attention: str, attn_pdrop: float) -> None:
    """Raises an InputError if weights of attention are to be dropped that are never there."""
    if attention == "cudnn" and attn_pdrop:
        raise InputError(
            "The attention cudnn drops no weights, but the model has attn_pdrop = "
            f"{attn_pdrop}; train without dropout (sft.dropout false), or set model.attention to "
            "blocks."
        )


def check_device(name: str) -> None:
    """Raises an InputError that names what asks for it unless the devices can run cuDNN's kernel.

    Compute capability 8.0 is the Ampere generation, with bfloat16.
    """
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not re.fullmatch(r"\d+\.\d+", capability):
        raise InputError(
            f"{name} needs an NVIDIA GPU, but JAX runs on {device.device_kind}; set "
            "model.attention to blocks, or install jax for CUDA."
        )
    if float(capability) < LEAST_CAPABILITY:
        raise InputError(
            f"{name} needs an NVIDIA GPU of compute capability {LEAST_CAPABILITY} or more, but "
            f"{device.device_kind} has {capability}; set model.attention to blocks."
        )
