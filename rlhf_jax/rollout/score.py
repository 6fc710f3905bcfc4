"""Hidden states, log-probabilities and scores of responses.

Responses are `Sequences`: one to each prompt, or K that share it. With `frozen`, the lower half
that `Model.split` returns, `params` are the upper half; no gradient is computed for the lower one.
`states` are the results of the lower half for these sequences, `frozen_states`, which passes share.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.batches import Sequences
from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.interface import Model, Params, SharedPrompt, positions_from
from rlhf_jax.models.readout import token_logprobs


class _Inputs(NamedTuple):
    """Inputs of the layers, [B, L], with all K responses of a shared prompt behind it."""

    tokens: jax.Array
    mask: jax.Array
    positions: jax.Array
    shared: SharedPrompt | None


def response_logprobs(
    model: Model,
    params: Params,
    sequences: Sequences,
    *,
    temperature: float,
    frozen: Params | None = None,
    states: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprobs f32[..., T], entropy f32[..., T], hidden [..., T, D]) of response tokens, in nats.

    "..." is B, or B, K.
    """
    if frozen is not None and states is None:
        states = frozen_states(model, frozen, sequences)
    hidden = response_hidden(model, params, sequences, states=states)
    full = params if frozen is None else model.merge(frozen, params)
    arrays = (hidden, sequences.tokens)
    return *token_logprobs(model, full, *arrays, temperature=temperature), hidden


def response_logits(
    model: Model,
    params: Params,
    hidden: jax.Array,
    *,
    temperature: float,
    frozen: Params | None = None,
) -> jax.Array:
    """f32[..., Vp] logits of hidden states divided by the temperature, -inf from V on."""
    full = params if frozen is None else model.merge(frozen, params)
    return model.padded_logits(full, hidden) / temperature


def response_hidden(
    model: Model, params: Params, sequences: Sequences, *, states: jax.Array | None = None
) -> jax.Array:
    """Hidden states in which each response token is chosen, [B, T, D] or [B, K, T, D].

    Token t of a response is predicted at position P + t - 1 of prompt and response together, the
    first one at the end of the prompt, so that P is at least 1. Only these states pass the final
    layer norm.
    """
    return model.final(
        params, _response_states(_results(model, params, sequences, states), sequences)
    )


def all_logprobs(
    model: Model,
    params: Params,
    sequences: Sequences,
    *,
    frozen: Params | None = None,
    states: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(prompt log-probabilities f32[B, P - 1], their mask, logprobs, hidden) at temperature 1.

    The first two are of prompt tokens after the first, in nats, and their mask bool[B, P - 1]; the
    last two are those of `response_logprobs`, from the same pass.
    """
    if frozen is not None and states is None:
        states = frozen_states(model, frozen, sequences)
    x = _results(model, params, sequences, states)
    full = params if frozen is None else model.merge(frozen, params)
    prompts, mask = sequences.prompts, sequences.prompt_mask
    before = model.final(params, x[:, : prompts.shape[1] - 1])
    prompt_logprobs, _ = token_logprobs(model, full, before, prompts[:, 1:])
    hidden = model.final(params, _response_states(x, sequences))
    logprobs, _ = token_logprobs(model, full, hidden, sequences.tokens)
    return prompt_logprobs, mask[:, 1:] & mask[:, :-1], logprobs, hidden


def _results(model, params, sequences, states):
    """[B, L, D] of the last layer, before the final norm."""
    inputs = _prediction_inputs(sequences)
    x = model.embed(params, inputs.tokens, inputs.positions) if states is None else states
    return _apply_layers(model, params, x, inputs)


def _response_states(x, sequences):
    """Those in which response tokens are chosen, [B, T, D] or [B, K, T, D]."""
    start = sequences.prompts.shape[1] - 1
    if sequences.tokens.ndim == 2:
        return x[:, start:]
    batch, count, length = sequences.tokens.shape
    width = x.shape[-1]
    first = jnp.broadcast_to(x[:, None, start : start + 1], (batch, count, 1, width))
    rest = x[:, start + 1 :].reshape(batch, count, length - 1, width)
    return jnp.concatenate([first, rest], axis=2)


def frozen_states(model: Model, frozen: Params, sequences: Sequences) -> jax.Array:
    """[B, L, D] in the compute dtype: the results of the frozen lower layers for `response_hidden`.

    L is P + T - 1, or P + K * (T - 1) where K responses share the prompt.
    """
    inputs = _prediction_inputs(sequences)
    x = model.embed(frozen, inputs.tokens, inputs.positions)
    return _apply_layers(model, frozen, x, inputs, first_layer=0)


def end_scores(
    model: Model, params: Params, sequences: Sequences, *, frozen: Params | None = None
) -> jax.Array:
    """f32[B] or f32[B, K]: scores of responses by a reward model, at their last real token.

    The prompt is run once, and its keys and values serve all K responses. A response without a real
    token is scored at its first position, which has no meaning.

    Args:
      params: {"model": parameters of a language model, "head": {"kernel": f32[D]}}.
      sequences: P may be 0.
      frozen: the lower half of the language model, if `params["model"]` is the upper one.
    """
    x, mask = _scored_hidden(model, params["model"], sequences, frozen)
    # Not the number of real tokens, which a mask with holes has before the last one.
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    scores = apply_head(params["head"], model.final(params["model"], x))
    return scores.reshape(sequences.mask.shape[:-1])


def token_scores(
    model: Model, params: Params, sequences: Sequences, *, frozen: Params | None = None
) -> jax.Array:
    """f32[B, T] or f32[B, K, T]: scores of the text up to and including each response token.

    The arguments are those of `end_scores`, the last of these scores. Those off the mask have no
    meaning.
    """
    x, _ = _scored_hidden(model, params["model"], sequences, frozen)
    return apply_head(params["head"], model.final(params["model"], x)).reshape(sequences.mask.shape)


def _prediction_inputs(sequences):
    """Inputs of all positions that predict a response token: the last token predicts none."""
    prompts, prompt_mask, tokens, mask = sequences
    if tokens.ndim == 3:
        return _shared_inputs(Sequences(prompts, prompt_mask, tokens[..., :-1], mask[..., :-1]))
    tokens = jnp.concatenate([prompts, tokens[:, :-1]], axis=1)
    mask = jnp.concatenate([prompt_mask, mask[:, :-1]], axis=1)
    return _Inputs(tokens, mask, positions_from(mask), None)


def _shared_inputs(sequences):
    """Inputs of all tokens of prompts and of their K responses."""
    prompts, prompt_mask, tokens, mask = sequences
    (batch, width), (_, count, length) = prompts.shape, tokens.shape
    own_positions = positions_from(mask.reshape(batch * count, length))
    own_positions = own_positions.reshape(mask.shape)
    own_positions += prompt_mask.sum(axis=1, dtype=jnp.int32)[:, None, None]
    pairs = (prompts, tokens), (prompt_mask, mask), (positions_from(prompt_mask), own_positions)
    tokens, mask, positions = (
        jnp.concatenate([x, y.reshape(batch, count * length)], axis=1) for x, y in pairs
    )
    return _Inputs(tokens, mask, positions, SharedPrompt(width, count) if length else None)


def _apply_layers(model, params, x, inputs, first_layer=None):
    x, _ = model.layers(
        params["layers"],
        x,
        inputs.mask,
        inputs.positions,
        shared=inputs.shared,
        first_layer=first_layer,
    )
    return x


def _scored_hidden(model, params, sequences, frozen):
    """([B * K, T, D] before the final layer norm, bool[B * K, T]).

    Prompt and responses pass each layer side by side, so that its parameters are read once.
    """
    if sequences.tokens.ndim == 2:
        sequences = sequences._replace(
            tokens=sequences.tokens[:, None], mask=sequences.mask[:, None]
        )
    inputs = _shared_inputs(sequences)
    x = model.embed(params if frozen is None else frozen, inputs.tokens, inputs.positions)
    # The frozen layers are a stack of their own, so that the backward pass ends above them.
    if frozen is not None:
        x = _apply_layers(model, frozen, x, inputs, first_layer=0)
    x = _apply_layers(model, params, x, inputs)
    batch, count, length = sequences.tokens.shape
    x = x[:, sequences.prompts.shape[1] :].reshape(batch * count, length, -1)
    return x, sequences.mask.reshape(-1, length)
