"""Rematerialization: layers that are computed again in the backward pass, to save memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.models.attention import ATTENDED
from rlhf_jax.models.cudnn_attention import FORWARD
from rlhf_jax.parallel.constraints import remat_all_gather


def _is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether it is cuDNN's attention, whose outputs cannot be named with `checkpoint_name`."""
    return primitive.name == FORWARD


_POLICIES = {
    "full": None,
    # Products with parameters have no batch axes; those inside attention have.
    "dots": functools.reduce(
        jax.checkpoint_policies.save_from_both_policies,
        (
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(ATTENDED),
            _is_cudnn,
        ),
    ),
}


def rematerialized(body: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The body of a scan over layers, whose backward pass computes some values again.

    Args:
      body: (carry, layer) -> (carry, output).
      remat: "none" saves everything except parameters gathered from other devices; "full" the
        carry alone, so that the layer is computed again; "dots" also the products with parameters
        and the outputs of attention, so that norms and activations are computed again. Values and
        gradients are the same.

    Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174).
    """
    if remat == "none":
        return remat_all_gather(body)
    # In a scan the compiler cannot merge the two computations, which is what CSE would do.
    return jax.checkpoint(body, prevent_cse=False, policy=_POLICIES[remat])
