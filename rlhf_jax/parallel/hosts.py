"""What several hosts of one run share: one of them writes, and all see the same arrays."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process is the one that logs, samples and exports."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays, whole on every host; all hosts have to call it.

    Meant for what is small: metrics, tokens, scores. One host's alone come as by `jax.device_get`.
    """
    return jax.tree.map(_whole, tree) if jax.process_count() > 1 else jax.device_get(tree)


def _whole(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return jax.device_get(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return multihost_utils.process_allgather(leaf, tiled=True)
