"""The record of a model family: its configuration, its model, and its tensors in files."""

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.models.settings import ModelSettings

Config = TypeVar("Config")

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SCORE = "score.weight"  # the head of a classifier
SCORE_BIAS = "score_bias"  # its bias, in config.json
_WITHOUT_PREFIX = (SCORE, "lm_head.weight")


class Slot(NamedTuple):
    """The place of a tensor of a file among the parameters.

    Attributes:
      path: of its leaf in the parameters of the model.
      layer: its index in a leaf of stacked layers; None for the full leaf.
      shape: in the file. It may differ from that of the leaf: without the padding of the
        vocabulary, [D, 3 D] for [D, 3, D], or [1, D] for the [D] of a head.
      transposed: whether a matrix of the file is [out, in], as in PyTorch's `Linear`, for a leaf
        [in, out].
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family in Hugging Face's format.

    Attributes:
      name: for messages, such as "GPT-2".
      model_type: in config.json, such as "gpt2".
      language_model, classifier: the two architectures in config.json, such as "GPT2LMHeadModel".
      config: the class of the configuration.
      model: the class of the model, model(config, dtype, remat, attention,
        generation_config, stored_types).
      read_config: from the object in config.json to the configuration; raises an InputError.
      write_config: from the configuration, and whether it is one of a classifier, to the object in
        config.json, without `model_type`, `architectures` and dtypes.
      fresh_config: from the settings of a fresh model and its vocab_size to the configuration.
      slots: every tensor of the model without a head, by its name without the prefix, in the order
        written.
      prefix: of the names of tensors but the two heads, such as "transformer.".
      tied: name of a tensor -> name of the tensor that it has to equal, where a file has it.
      ignored: suffixes of the names of tensors that are no parameters, such as masks.
      sizes: configurations of known models, by name.
    """

    name: str
    model_type: str
    language_model: str
    classifier: str
    config: type
    model: Callable[..., Model]
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any, bool], dict[str, Any]]
    fresh_config: Callable[[ModelSettings, int], Any]
    slots: Callable[[Any], dict[str, Slot]]
    prefix: str
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def full_name(self, name: str) -> str:
        """The name of a tensor in a written file."""
        return name if name in _WITHOUT_PREFIX else self.prefix + name


@functools.cache
def param_shapes(model: Model) -> Params:
    """Shapes and dtypes of the parameters; traced once for each model. Do not change the tree."""
    # A key would be an array, which a mesh of devices that are not there cannot hold.
    return jax.eval_shape(model.init, jax.eval_shape(functools.partial(jax.random.key, 0)))


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf at a path of keys."""
    return functools.reduce(operator.getitem, path, tree)


def check_fixed(data: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises an InputError if a key of config.json has another value than the fixed one, if any."""
    for key, allowed in fixed.items():
        if data.get(key, allowed) != allowed:
            raise InputError(
                f"{key} is {data[key]!r}, but only {allowed!r} is supported; choose another model."
            )


def check_highest(config: Any, highest: int, names: Sequence[str]) -> None:
    """Raises an InputError if one of these values of a configuration is above the highest."""
    for name in names:
        if (getattr(config, name) or 0) > highest:
            raise InputError(
                f"config.{name} must be at most {highest}, but is {getattr(config, name)}."
            )


def known_fields(config: type[Config], data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of config.json that have a field of the same name, by that name.

    The default of a field determines its type: an integer, also without a default, a number, a
    string, or with None an integer or null. A value of another type raises an InputError.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return {name: _typed(fields[name], data[name]) for name in fields if name in data}


def _typed(field: dataclasses.Field, value: Any) -> Any:
    kind = int if field.default in (None, dataclasses.MISSING) else type(field.default)
    if value is None and field.default is None:
        return None
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**63 else math.inf
    if type(value) is not kind:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        allowed = names[kind] + (" or null" if field.default is None else "")
        raise InputError(f"{field.name} must be {allowed}, but is {json.dumps(value)}.")
    return value
