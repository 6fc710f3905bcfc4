"""What is read off responses: hidden states that predict them, log-probabilities, scores."""

import jax
import jax.numpy as jnp

from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.interface import Model, Params, positions_from


def response_hidden(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Hidden states in which each response token is chosen.

    Token t of the response is predicted at position P + t - 1 of prompt and response together, so
    the first one at the end of the prompt. Only these T states pass the final layer norm.

    Args:
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded, P >= 1.
      tokens, mask: i32[B, T] and bool[B, T], right-padded.

    Returns:
      [B, T, D] in the compute dtype.
    """
    whole = jnp.concatenate([prompts, tokens[:, :-1]], axis=1)
    whole_mask = jnp.concatenate([prompt_mask, mask[:, :-1]], axis=1)
    positions = positions_from(whole_mask)
    x = model.embed(params, whole, positions)
    x, _ = model.layers(params["layers"], x, whole_mask, positions)
    return model.final(params, x[:, prompts.shape[1] - 1 :])


def end_scores(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    responses: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Scores of K responses to each prompt by a reward model, read at the last real token.

    The prompt is run once and its keys and values serve all K responses.

    Args:
      model: a language model.
      params: {"model": its parameters, "head": {"kernel": f32[D]}}.
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded; P may be 0.
      responses, mask: i32[B, K, T] and bool[B, K, T], right-padded; a response without a real token
        is scored at its first position, which means nothing.

    Returns:
      f32[B, K].
    """
    x, flat_mask = _judged_hidden(model, params["model"], prompts, prompt_mask, responses, mask)
    last = jnp.maximum(flat_mask.sum(axis=1) - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return apply_head(params["head"], model.final(params["model"], x)).reshape(mask.shape[:2])


def token_scores(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    responses: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Scores at every token of K responses to each prompt: of the text up to and with that token.

    The arguments are those of `end_scores`, which gives the last of these scores of each response.

    Returns:
      f32[B, K, T]; off the mask they mean nothing.
    """
    x, _ = _judged_hidden(model, params["model"], prompts, prompt_mask, responses, mask)
    return apply_head(params["head"], model.final(params["model"], x)).reshape(mask.shape)


def _judged_hidden(model, trunk, prompts, prompt_mask, responses, mask):
    """([B * K, T, D] before the final layer norm, bool[B * K, T]): each prompt is run once."""
    _, count, length = responses.shape
    flat, flat_mask = responses.reshape(-1, length), mask.reshape(-1, length)
    positions = positions_from(flat_mask)
    prefix = None
    if prompts.shape[1]:
        prompt_positions = positions_from(prompt_mask)
        x = model.embed(trunk, prompts, prompt_positions)
        cache = model.init_cache(*prompts.shape)
        _, prefix = model.layers(trunk["layers"], x, prompt_mask, prompt_positions, cache)
        positions += jnp.repeat(prompt_mask.sum(axis=1, dtype=jnp.int32), count)[:, None]
    x = model.embed(trunk, flat, positions)
    x, _ = model.layers(trunk["layers"], x, flat_mask, positions, prefix=prefix)
    return x, flat_mask
