"""The types of tensors in files: those that a model was read in, where nothing is lost."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.family import Slot, leaf_at
from rlhf_jax.models.interface import Params

# The names of safetensors; a file is little-endian.
NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def written_types(
    stored: Mapping[str, str], slots: Mapping[str, Slot], params: Params
) -> dict[str, str]:
    """The type of each tensor in a written file.

    Those of `stored`, if it has all tensors and no parameter loses anything in its type; else "F32"
    for all, as after training, whose steps are finer than the other types.
    """
    types = {name: stored.get(name, "F32") for name in slots}
    small = dict.fromkeys((slots[name].path, kind) for name, kind in types.items() if kind != "F32")
    is_kept = slots.keys() <= stored.keys() and all(
        bool(_is_exact(leaf_at(params, path), kind)) for path, kind in small
    )
    return types if is_kept else dict.fromkeys(slots, "F32")


def dtype_in_config(types: Iterable[str]) -> str:
    """The dtype in config.json for tensors of these types: that of most of them.

    >>> dtype_in_config(["F32", "BF16", "BF16"])
    'bfloat16'
    """
    ((kind, _),) = collections.Counter(types).most_common(1)
    return _NAMES[kind]


@functools.partial(jax.jit, static_argnums=1)
def _is_exact(leaf: jax.Array, kind: str) -> jax.Array:
    """Whether all values are numbers of a 16-bit type.

    By bits: XLA may leave out a conversion to the type and back.
    """
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    if kind == "BF16":
        return jnp.all(bits & 0xFFFF == 0)
    steps = leaf * 2.0**24  # in units of the smallest number of float16
    fits = (jnp.abs(leaf) <= 65504.0) & (steps == jnp.floor(steps))
    return jnp.all(fits & (bits & 0x1FFF == 0))
