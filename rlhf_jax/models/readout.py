"""Log-probabilities and cross entropy of tokens, from the hidden states of a model.

Below a vocabulary of `LINEAR_VOCABULARY` they are computed from all logits at once, f32[..., T, V].
From there on logits are made in chunks of positions, of 128 MiB a device and at most half of T, and
freed again, so that no array holds the logits of all tokens. On several devices the vocabulary is
split over `fsdp` and `tensor`, and each of them reads the hidden states of all examples of its part
of `data`: no device holds the full unembedding or its gradient, in float32. Fewer bytes move that
way as long as a pass has fewer target tokens than about half of V (the split: Shoeybi et al.,
Megatron-LM, section 3; arXiv:1909.08053).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.functional.linear import positions_per_chunk
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel.constraints import constrain_vocabulary, map_over_data

# Vocabularies of 32,000 to 65,536 (Llama 2, GPT-2, SmolLM) are below, those of 100,000 to 262,144
# (Llama 3, OLMo 2, Qwen, Gemma) above. See docs/performance.md, "Large vocabularies".
LINEAR_VOCABULARY = 100_000


def token_logprobs(
    model: Model,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """(logprobs f32[..., T], entropy f32[..., T]) in nats, of logits divided by the temperature.

    Args:
      params: the full parameters.
      hidden: [..., T, D] after the final norm, from which each token is predicted.
      tokens: i32[..., T].
    """
    if not _is_linear(model):
        logits = model.padded_logits(params, hidden) / temperature
        return functional.token_logprobs(logits, tokens), functional.token_entropy(logits)
    *_, length, width = hidden.shape

    def logprobs_of(hidden, tokens, unembedding, temperature):
        batch, length = tokens.shape
        return functional.linear_token_logprobs(
            hidden,
            unembedding,
            tokens,
            temperature=temperature,
            chunk_size=positions_per_chunk(batch, length, len(unembedding)),
            **_options(model),
        )

    batch = math.prod(tokens.shape[:-1])
    flat = hidden.reshape(batch, length, width), tokens.reshape(batch, length)
    table = constrain_vocabulary(model.unembedding(params))
    shared = (table, jnp.asarray(temperature, jnp.float32))
    results = map_over_data(logprobs_of, flat, shared)
    logprobs, entropy = (x.reshape(tokens.shape) for x in results)
    return logprobs, entropy


def cross_entropy_loss(
    model: Model,
    params: Params,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    denominator: jax.Array | float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`functional.cross_entropy_loss` of targets i32[B, T], from hidden states [B, T, D].

    Args:
      params: the full parameters.
    """
    terms = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    if not _is_linear(model):
        arrays = (model.padded_logits(params, hidden), targets, mask)
        return functional.cross_entropy_loss(*arrays, **terms, denominator=denominator)
    count = jnp.sum(mask, dtype=jnp.float32) if denominator is None else denominator

    def loss_of(hidden, targets, mask, unembedding, count):
        arrays = (hidden, unembedding, targets, mask)
        options = {**terms, **_options(model), "denominator": count}
        return functional.linear_cross_entropy_loss(*arrays, **options)

    table = constrain_vocabulary(model.unembedding(params))
    shared = (table, jnp.asarray(count, jnp.float32))
    return map_over_data(loss_of, (hidden, targets, mask), shared)


def _is_linear(model: Model) -> bool:
    return model.config.vocab_size >= LINEAR_VOCABULARY


def _options(model: Model) -> dict[str, Any]:
    return {
        "softcap": model.logit_softcap,
        "logit_scale": model.logit_scale,
        "vocab_size": model.config.vocab_size,
    }
