"""What is read off responses: hidden states that predict them, log-probabilities, scores."""

import jax
import jax.numpy as jnp

from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.interface import Model, Params, SharedPrompt, positions_from


def response_hidden(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    lower: jax.Array | None = None,
) -> jax.Array:
    """Hidden states in which each response token is chosen.

    Token t of the response is predicted at position P + t - 1 of prompt and response together, so
    the first one at the end of the prompt. Only these T states pass the final layer norm.

    Args:
      params: whole, or, where `lower` is given, the upper half that `model.split` gives.
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded, P >= 1.
      tokens, mask: i32[B, T] and bool[B, T], right-padded.
      lower: [B, P + T - 1, D], what `frozen_states` made of the same rows.

    Returns:
      [B, T, D] in the compute dtype.
    """
    whole, whole_mask, positions = _read_rows(prompts, prompt_mask, tokens, mask)
    x = model.embed(params, whole, positions) if lower is None else lower
    x, _ = model.layers(params["layers"], x, whole_mask, positions)
    return model.final(params, x[:, prompts.shape[1] - 1 :])


def frozen_states(
    model: Model,
    frozen: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """[B, P + T - 1, D] in the compute dtype: what the upper layers read of the same rows.

    Args:
      frozen: the lower half that `model.split` gives, with the embeddings.
    """
    whole, whole_mask, positions = _read_rows(prompts, prompt_mask, tokens, mask)
    x, _ = model.layers(
        frozen["layers"], model.embed(frozen, whole, positions), whole_mask, positions
    )
    return x


def _read_rows(prompts, prompt_mask, tokens, mask):
    """(tokens, mask, positions) of all that is read: the last token of a response predicts none."""
    whole = jnp.concatenate([prompts, tokens[:, :-1]], axis=1)
    whole_mask = jnp.concatenate([prompt_mask, mask[:, :-1]], axis=1)
    return whole, whole_mask, positions_from(whole_mask)


def end_scores(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    responses: jax.Array,
    mask: jax.Array,
    *,
    frozen: Params | None = None,
) -> jax.Array:
    """Scores of K responses to each prompt by a reward model, read at the last real token.

    The prompt is run once and its keys and values serve all K responses.

    Args:
      model: a language model.
      params: {"model": its parameters, "head": {"kernel": f32[D]}}.
      prompts, prompt_mask: i32[B, P] and bool[B, P], left-padded; P may be 0.
      responses, mask: i32[B, K, T] and bool[B, K, T], right-padded; a response without a real token
        is scored at its first position, which means nothing.
      frozen: the lower half that `model.split` gives, where `params["model"]` is the upper one; no
        gradient is computed for it.

    Returns:
      f32[B, K].
    """
    rows = (prompts, prompt_mask, responses, mask)
    x, flat_mask = _judged_hidden(model, params["model"], *rows, frozen)
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
    *,
    frozen: Params | None = None,
) -> jax.Array:
    """Scores at every token of K responses to each prompt: of the text up to and with that token.

    The arguments are those of `end_scores`, which gives the last of these scores of each response.

    Returns:
      f32[B, K, T]; off the mask they mean nothing.
    """
    rows = (prompts, prompt_mask, responses, mask)
    x, _ = _judged_hidden(model, params["model"], *rows, frozen)
    return apply_head(params["head"], model.final(params["model"], x)).reshape(mask.shape)


def _judged_hidden(model, trained, prompts, prompt_mask, responses, mask, frozen):
    """([B * K, T, D] before the final layer norm, bool[B * K, T]): each prompt is run once.

    Prompt and responses go through each layer side by side, so that its parameters are met once.
    """
    (batch, width), (_, count, length) = prompts.shape, responses.shape
    flat_mask = mask.reshape(-1, length)
    before = prompt_mask.sum(axis=1, dtype=jnp.int32)[:, None]
    own_positions = positions_from(flat_mask).reshape(batch, -1) + before
    whole, whole_mask, positions = (
        jnp.concatenate([prompt, rest.reshape(batch, -1)], axis=1)
        for prompt, rest in (
            (prompts, responses),
            (prompt_mask, mask),
            (positions_from(prompt_mask), own_positions),
        )
    )
    x = model.embed(trained if frozen is None else frozen, whole, positions)
    # A stack of its own for the frozen layers, which are then not gone back through.
    for part in (frozen, trained):
        if part is not None:
            shared = SharedPrompt(width, count)
            x, _ = model.layers(part["layers"], x, whole_mask, positions, shared=shared)
    return x[:, width:].reshape(batch * count, length, -1), flat_mask
