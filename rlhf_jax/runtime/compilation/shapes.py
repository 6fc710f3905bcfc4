"""Shapes of batches, by the kind of their examples, with the greatest lengths of the settings."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.batches import PairBatch, PromptBatch, RankingBatch, Rollout, TextBatch
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.kinds import AnyBatch
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.sft import max_targets, target_width


def batch_shapes(
    kind: Kind,
    batch_size: int,
    data: DataSettings,
    *,
    num_responses: int = 4,
    target_tokens: int | None = None,
) -> AnyBatch:
    """A batch as its encoder returns it, of `jax.ShapeDtypeStruct`.

    Args:
      num_responses: K of rankings.
      target_tokens: of a sequence of texts, at most; by default `max_targets`.
    """
    if kind == "text":
        return _texts(batch_size, data, target_tokens)
    prompts = _sequences(batch_size, data.max_prompt_length)
    if kind in ("prompts", "references"):
        return PromptBatch(*prompts, _array(jnp.int32, batch_size))
    if kind == "rankings":
        responses = _sequences(batch_size, num_responses, data.max_response_length)
        return RankingBatch(*prompts, *responses)
    responses = _sequences(batch_size, data.max_response_length)
    valid = _array(bool, batch_size)
    return PairBatch(*prompts, *responses, *responses, _array(jnp.float32, batch_size), valid)


def rollout_shapes(batch_size: int, response_length: int) -> tuple[Rollout, Any]:
    """(sampled responses, f32[B] scores)."""
    shape = (batch_size, response_length)
    rollout = Rollout(*_sequences(*shape), _array(jnp.float32, *shape))
    return rollout, _array(jnp.float32, batch_size)


def _texts(batch_size: int, data: DataSettings, target_tokens: int | None) -> TextBatch:
    count = max_targets(data) if target_tokens is None else target_tokens
    width = target_width([count], data.max_length)
    targets = None if width is None else _array(jnp.int32, batch_size, width)
    tokens, mask = _sequences(batch_size, data.max_length)
    return TextBatch(tokens, tokens, mask, targets)


def _sequences(*shape: int) -> tuple[Any, Any]:
    """(tokens, mask)."""
    return _array(jnp.int32, *shape), _array(bool, *shape)


def _array(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
