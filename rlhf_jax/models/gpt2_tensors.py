"""The tensors of a GPT-2 in Hugging Face's format, and where each belongs among our parameters."""

import functools
from typing import Any, NamedTuple

import jax

from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.interface import Params

SCORE = "score.weight"
WTE = "wte.weight"

# Tensor name (without its `transformer.`) -> path in the parameters. Hugging Face's Conv1D kernels
# are [in, out] as ours, so nothing is transposed.
_TOP: dict[str, tuple[str, ...]] = {
    WTE: ("wte", "embedding"),
    "wpe.weight": ("wpe", "embedding"),
    "ln_f.weight": ("ln_f", "scale"),
    "ln_f.bias": ("ln_f", "bias"),
}
_LAYER: dict[str, tuple[str, ...]] = {
    "ln_1.weight": ("ln_1", "scale"),
    "ln_1.bias": ("ln_1", "bias"),
    "attn.c_attn.weight": ("attn", "c_attn", "kernel"),
    "attn.c_attn.bias": ("attn", "c_attn", "bias"),
    "attn.c_proj.weight": ("attn", "c_proj", "kernel"),
    "attn.c_proj.bias": ("attn", "c_proj", "bias"),
    "ln_2.weight": ("ln_2", "scale"),
    "ln_2.bias": ("ln_2", "bias"),
    "mlp.c_fc.weight": ("mlp", "c_fc", "kernel"),
    "mlp.c_fc.bias": ("mlp", "c_fc", "bias"),
    "mlp.c_proj.weight": ("mlp", "c_proj", "kernel"),
    "mlp.c_proj.bias": ("mlp", "c_proj", "bias"),
}


class Slot(NamedTuple):
    """Where a tensor belongs.

    Attributes:
      path: of its leaf in {"model": ..., "head": ...}.
      layer: which layer of the leaf it is; None for the whole leaf.
      shape: in the file. Of `c_attn` that is one axis less than here, [D, 3 D] for [D, 3, D]; of a
        reward head one more, [1, D] for [D]; and the vocabulary is not padded.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def slots_of(model: GPT2, *, with_head: bool) -> dict[str, Slot]:
    """Every tensor of the folder by its name without `transformer.`, in the order written."""
    config = model.config
    params, width = param_shapes(model), config.n_embd
    slots: dict[str, Slot] = {}
    for name, path in _TOP.items():
        slots[name] = Slot(("model", *path), None, leaf_at(params, path).shape)
    slots[WTE] = slots[WTE]._replace(shape=(config.vocab_size, width))
    for layer in range(config.n_layer):
        for name, path in _LAYER.items():
            shape = leaf_at(params["layers"], path).shape[1:]
            if path[1] == "c_attn":  # [D, 3, D] and [3, D] here
                shape = (*shape[:-2], 3 * width)
            slots[f"h.{layer}.{name}"] = Slot(("model", "layers", *path), layer, shape)
    if with_head:
        slots[SCORE] = Slot(("head", "kernel"), None, (1, width))
    return slots


@functools.cache
def param_shapes(model: GPT2) -> Params:
    """Shapes and dtypes of the parameters; traced once for each model, and only to be read."""
    return jax.eval_shape(model.init, jax.random.key(0))


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf at a path of keys."""
    return functools.reduce(lambda node, key: node[key], path, tree)


def full_name(name: str) -> str:
    """The name of a tensor in what is written."""
    return name if name == SCORE else f"transformer.{name}"
