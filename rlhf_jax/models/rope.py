"""Rotary position embeddings and the ways to scale them for longer contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.models.config_values import integer, is_true, positive

_TYPES = ("default", "linear", "llama3", "yarn")

_CONTEXT = "original_max_position_embeddings"
# The numbers of config.json, all above 0, that a type needs or may have.
_NEEDED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
    "yarn": ("factor",),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {"yarn": ("beta_slow", "beta_fast")}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (Su et al. 2021, RoFormer; arXiv:2104.09864), scaled or not.

        angle_{t,i} = t * f_i,     f_i = theta^(-2i / d),     0 <= i < d / 2

    and the pair of dimensions (i, i + d / 2) turns by it.

    Attributes:
      rope_theta: theta.
      rope_type: "default"; "linear", f / factor (Chen et al. 2023, arXiv:2306.15595); "llama3",
        long wavelengths divided by the factor, short ones kept, others interpolated (Llama Team
        2024, arXiv:2407.21783, and the reference code of Llama 3.1); "yarn" (Peng et al. 2023,
        arXiv:2309.00071).
      factor: how much longer the context is than in pretraining.
      original_max_position_embeddings: the length of that context.
      low_freq_factor, high_freq_factor: of "llama3".
      beta_slow, beta_fast, truncate, attention_factor: of "yarn"; the last one multiplies cosines
        and sines.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True
    attention_factor: float = 1.0

    def frequencies(self, width: int) -> np.ndarray:
        """f32[d / 2] of heads of width d."""
        exponents = np.arange(0, width, 2, dtype=np.float64) / width
        frequencies = self.rope_theta**-exponents
        if self.rope_type == "linear":
            frequencies /= self.factor
        elif self.rope_type == "llama3":
            turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            frequencies = self._interpolated(frequencies, np.clip(kept, 0, 1))
        elif self.rope_type == "yarn":
            low, high = (
                self._dimension(width, turns) for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, width - 1)
            ramp = (np.arange(width // 2) - low) / ((high - low) or 0.001)
            frequencies = self._interpolated(frequencies, 1 - np.clip(ramp, 0, 1))
        return frequencies.astype(np.float32)

    def _interpolated(self, frequencies, kept):
        """Frequencies of which a share is kept and the rest divided by the factor."""
        return frequencies * (kept + (1 - kept) / self.factor)

    def _dimension(self, width, turns):
        """The dimension that turns so often within the original context."""
        length = math.log(self.original_max_position_embeddings) - math.log(2 * math.pi)
        return width * (length - math.log(turns)) / (2 * math.log(self.rope_theta))


def rotations(ropes: tuple[Rope | None, ...], positions: jax.Array, width: int):
    """(cosines, sines), f32[R, B, L, d / 2] each, of R embeddings at i32[B, L] positions.

    None turns nothing. Angles are float32 whatever the compute dtype.
    """
    still = np.zeros(width // 2, np.float32)
    frequencies = np.stack([still if rope is None else rope.frequencies(width) for rope in ropes])
    factors = [1.0 if rope is None else rope.attention_factor for rope in ropes]
    scale = np.array(factors, np.float32)[:, None, None, None]
    angles = positions.astype(jnp.float32)[None, :, :, None] * frequencies[:, None, None]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array], scale: float = 1.0) -> jax.Array:
    """[B, H, L, d] turned by (cosines, sines) [B, L, d / 2] and multiplied by the scale.

    Both in float32; the result has the dtype of x.
    """
    cos, sin = (part[:, None] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return (jnp.concatenate(turned, axis=-1) * scale).astype(x.dtype)


def read_rope(data: Mapping[str, Any], default_theta: float, layer_type: str | None = None) -> Rope:
    """The rotary embedding of a config.json.

    Args:
      data: with `rope_parameters`, perhaps by layer type (transformers 5), or with `rope_theta` and
        `rope_scaling` (transformers 4).
      default_theta: where config.json has none.
      layer_type: the key of `rope_parameters`, where these are by layer type.

    Raises:
      InputError: of a type that is not supported, or a value that is no number in range.
    """
    values = _rope_values(data, layer_type)
    kind = _kind(values)
    if values.get("partial_rotary_factor", data.get("partial_rotary_factor")) not in (None, 1):
        raise InputError("partial_rotary_factor is not 1, which is not supported.")
    theta = data.get("rope_theta")
    theta = values.get("rope_theta", default_theta if theta is None else theta)
    rope = Rope(positive("rope_theta", theta), kind)
    return rope if kind == "default" else _scaled(rope, values, data.get("max_position_embeddings"))


def _scaled(rope: Rope, values: Mapping[str, Any], positions: Any) -> Rope:
    """The embedding with the numbers of its type; `positions` is the context by default."""
    kind = rope.rope_type
    for name in _NEEDED[kind]:
        if values.get(name) is None:
            raise InputError(f"rope_type {kind!r} needs a {name}, but config.json has none.")
    keys = (*_NEEDED[kind], *_OPTIONAL.get(kind, ()))
    known: dict[str, Any] = {
        name: positive(name, values[name]) for name in keys if values.get(name) is not None
    }
    if kind == "linear":
        return dataclasses.replace(rope, **known)
    length = values.get(_CONTEXT)
    known[_CONTEXT] = integer(_CONTEXT, positions if length is None else length)
    rope = dataclasses.replace(rope, **known)
    if kind == "llama3":
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise InputError(
                f"high_freq_factor must be above low_freq_factor = {rope.low_freq_factor}, but is "
                f"{rope.high_freq_factor}."
            )
        return rope
    if rope.rope_theta <= 1:
        raise InputError(f"rope_theta must be above 1 for yarn, but is {rope.rope_theta}.")
    factor = _attention_factor(rope, values)
    return dataclasses.replace(
        rope, truncate=is_true(values, "truncate", True), attention_factor=factor
    )


def _rope_values(data: Mapping[str, Any], layer_type: str | None) -> Mapping[str, Any]:
    """The object that holds the type of the embedding and its numbers; {} without one."""
    values: Mapping[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        own = data.get(name)
        if own is not None and not isinstance(own, Mapping):
            raise InputError(f"{name} must be an object or null, but is {own!r}.")
        values = own or values
    if layer_type is None or layer_type not in values:
        return values
    own = values[layer_type]
    if not isinstance(own, Mapping):
        raise InputError(f"rope_parameters.{layer_type} must be an object, but is {own!r}.")
    return own


def _kind(values: Mapping[str, Any]) -> str:
    kind, old = values.get("rope_type"), values.get("type")
    if None not in (kind, old) and kind != old:
        raise InputError(
            f"rope_type is {kind!r}, but type is {old!r}; remove one of the two from config.json."
        )
    kind = "default" if kind is None and old is None else kind or old
    if kind not in _TYPES:
        raise InputError(
            f"rope_type is {kind!r}, but only {', '.join(_TYPES)} are supported; choose another "
            "model."
        )
    return kind


def _attention_factor(rope: Rope, values: Mapping[str, Any]) -> float:
    """The factor itself, or the one of `mscale` and `mscale_all_dim`, or that of the paper."""
    names = ("attention_factor", "mscale", "mscale_all_dim")
    known = {name: positive(name, values[name]) for name in names if values.get(name) is not None}
    if "attention_factor" in known or rope.factor <= 1:
        return known.get("attention_factor", 1.0)
    step = 0.1 * math.log(rope.factor)
    if len(known) == 2:
        factor = (step * known["mscale"] + 1.0) / (step * known["mscale_all_dim"] + 1.0)
        return positive("mscale / mscale_all_dim", factor)
    return step + 1.0
