"""Log-probabilities and cross entropy of given tokens, from the hidden states of a model.

Below a vocabulary of `LINEAR_VOCABULARY` they are computed from all logits at once, f32[..., T, V].
From there on logits are made in chunks of positions, of 128 MiB a device and at most half of T, and
freed again, so that no array holds the logits of all tokens.
"""

import jax

from rlhf_jax import functional
from rlhf_jax.functional.linear import positions_per_chunk
from rlhf_jax.models.interface import Model, Params

# Vocabularies of 32,000 to 65,536 (Llama 2, GPT-2, SmolLM) are below, those of 100,000 to 262,144
# (Llama 3, OLMo 2, Qwen, Gemma) above. See docs/performance.md, "Large vocabularies".
LINEAR_VOCABULARY = 100_000


def is_linear(model: Model) -> bool:
    """Whether the vocabulary is so large that no array holds all logits."""
    return model.config.vocab_size >= LINEAR_VOCABULARY


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
    if not is_linear(model):
        logits = model.padded_logits(params, hidden) / temperature
        return functional.token_logprobs(logits, tokens), functional.token_entropy(logits)
    *_, length, width = hidden.shape
    flat = hidden.reshape(-1, length, width)
    unembedding = model.unembedding(params)
    logprobs, entropy = functional.linear_token_logprobs(
        flat,
        unembedding,
        tokens.reshape(-1, length),
        temperature=temperature,
        softcap=model.logit_softcap,
        logit_scale=model.logit_scale,
        chunk_size=positions_per_chunk(len(flat), length, len(unembedding)),
        vocab_size=model.config.vocab_size,
    )
    return logprobs.reshape(tokens.shape), entropy.reshape(tokens.shape)


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
    terms = {"label_smoothing": label_smoothing, "z_loss": z_loss, "denominator": denominator}
    if not is_linear(model):
        logits = model.padded_logits(params, hidden)
        return functional.cross_entropy_loss(logits, targets, mask, **terms)
    return functional.linear_cross_entropy_loss(
        hidden,
        model.unembedding(params),
        targets,
        mask,
        softcap=model.logit_softcap,
        logit_scale=model.logit_scale,
        vocab_size=model.config.vocab_size,
        **terms,
    )
