"""Generation: the prompts in one pass, then a `while_loop` over a key-value cache."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.batches import Rollout
from rlhf_jax.errors import InputError
from rlhf_jax.models.cache import Cache, repeated
from rlhf_jax.models.interface import Model, Params, positions_from
from rlhf_jax.parallel.constraints import constrain_batch, constrain_batch_over_all
from rlhf_jax.rollout.sampling import filtered_logprobs, sample_token


class _Sampling(NamedTuple):
    """The settings of `generate` that each step reads, all static but the limits."""

    temperature: float
    top_k: int
    top_p: float
    stop_token_ids: tuple[int, ...]
    min_new_tokens: int
    max_lengths: jax.Array | None


class _State(NamedTuple):
    """The carry of the loop: t tokens are written, the last of them is not yet in the cache."""

    t: jax.Array
    rollout: Rollout
    running: jax.Array  # bool[B]: responses that continue after the last written token
    cache: Cache


def generate(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_token_ids: Sequence[int] = (),
    min_new_tokens: int = 0,
    max_lengths: jax.Array | None = None,
    num_responses: int | None = None,
) -> Rollout:
    """Samples one response to each prompt, or several.

    A response ends with the first stop token, which belongs to it, or at its limit; the loop ends
    when all have ended. Step t draws with `fold_in(key, t)`, one uniform number for each index of
    the batch, so that the tokens depend neither on the number of devices nor on the other prompts.
    Response k of K to prompt b has index b * K + k. The prompt runs once for all K, each of which
    then has a copy of its keys and values.
    Parts of a batch that are sampled apart need a key each: with one key, equal prompts at equal
    indices of two parts have equal responses.

    Args:
      model, params: a language model; params may be sharded, and may be the result of
        `model.for_decoding`, which saves a copy if they are used for nothing else.
      prompts: i32[B, P], left-padded, P >= 1.
      prompt_mask: bool[B, P], False then True. The response to a prompt without a real token is
        empty.
      key: a JAX random key.
      max_new_tokens: T.
      temperature: divides the logits; 0 chooses the likeliest token (greedy).
      top_k: keeps the k likeliest tokens; 0 keeps all.
      top_p: keeps the smallest set of likeliest tokens with at least this probability.
      stop_token_ids: tokens that end a response.
      min_new_tokens: stop tokens cannot be drawn before this many tokens.
      max_lengths: i32[B], or i32[B, K] with `num_responses`, a limit for each response, at most T;
        None is T for all. All arguments except this one, the parameters, prompts and key are
        static.
      num_responses: K; None is one response, without an axis for it.

    Returns:
      Rollout(tokens i32[..., T], mask bool[..., T], logprobs f32[..., T]), where "..." is B or
      B, K; tokens and logprobs are 0 off the mask. Logprobs, in nats, are those of the distribution
      sampled from; greedy ones are 0.

    Raises:
      InputError: P + T exceeds the model's positions, or a setting is out of its range.
    """
    stops, limits = tuple(stop_token_ids), None if max_lengths is None else max_lengths.reshape(-1)
    sampling = _Sampling(temperature, top_k, top_p, stops, min_new_tokens, limits)
    _check(model, prompts, max_new_tokens, sampling, num_responses)
    batch, width = prompts.shape
    params = model.for_decoding(params)
    positions = positions_from(prompt_mask)
    room = model.init_cache(batch, width + max_new_tokens - 1)
    x = model.embed(params, prompts, positions)
    x, cache = model.layers(params["layers"], x, prompt_mask, positions, room)
    assert cache is not None  # a cache goes in, so one comes out
    last, next_position, running = x[:, -1], positions[:, -1] + 1, prompt_mask[:, -1]
    if num_responses is not None:
        last, next_position, running = (
            jnp.repeat(part, num_responses, axis=0) for part in (last, next_position, running)
        )
        cache = repeated(cache, num_responses)
    shape = (len(running), max_new_tokens)
    empty = Rollout(*(jnp.zeros(shape, dtype) for dtype in (jnp.int32, bool, jnp.float32)))
    if limits is not None:
        running &= limits > 0
    start = _State(jnp.int32(0), empty, running, cache._replace(length=jnp.int32(cache.length)))
    state = _write(model, params, last, start, key, sampling)

    def unfinished(state):
        return (state.t < max_new_tokens) & jnp.any(state.running)

    def step(state):
        token = jax.lax.dynamic_index_in_dim(state.rollout.tokens, state.t - 1, axis=1)
        position = (next_position + state.t - 1)[:, None]
        x = model.embed(params, token, position, decode=True)
        x, cache = model.layers(params["layers"], x, state.running[:, None], position, state.cache)
        return _write(model, params, x[:, -1], state._replace(cache=cache), key, sampling)

    rollout = jax.lax.while_loop(unfinished, step, state).rollout
    if num_responses is None:
        return rollout
    return jax.tree.map(lambda part: part.reshape(batch, num_responses, -1), rollout)


def _write(model, params, x, state: _State, key, sampling: _Sampling) -> _State:
    """Draws token t from the last hidden states x [B, D], and updates `running`."""
    t, running = state.t, state.running
    # The full distribution of a response is on the device that draws its token.
    logits = model.padded_logits(params, model.final(params, x), decode=True)
    logits = constrain_batch_over_all(logits)
    drawn = _draw(logits, jax.random.fold_in(key, t), t, sampling)
    tokens, logprobs = (constrain_batch(x) for x in drawn)
    column = Rollout(jnp.where(running, tokens, 0), running, jnp.where(running, logprobs, 0.0))
    rollout = jax.tree.map(
        lambda array, new: jax.lax.dynamic_update_index_in_dim(array, new, t, axis=1),
        state.rollout,
        column,
    )
    for stop in sampling.stop_token_ids:
        running &= tokens != stop
    if sampling.max_lengths is not None:
        running &= t + 1 < sampling.max_lengths
    return _State(t + 1, rollout, running, state.cache)


def _draw(logits, key, t, sampling: _Sampling) -> tuple[jax.Array, jax.Array]:
    """(tokens i32[B], logprobs f32[B]) of f32[B, V] logits at step t."""
    if sampling.min_new_tokens and sampling.stop_token_ids:
        stops = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(sampling.stop_token_ids))
        logits = jnp.where(stops & (t < sampling.min_new_tokens), -jnp.inf, logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[:1])
    logprobs = filtered_logprobs(
        logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )
    tokens = sample_token(logprobs, jax.random.uniform(key, logits.shape[:1]))
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


def _check(
    model: Model,
    prompts: jax.Array,
    length: int,
    sampling: _Sampling,
    num_responses: int | None,
) -> None:
    width, positions = prompts.shape[1], model.config.n_positions
    if num_responses is not None and num_responses < 1:
        raise InputError(f"num_responses must be at least 1, but is {num_responses}.")
    if width < 1:
        raise InputError("generate needs prompts of at least one token.")
    if length < 1:
        raise InputError(f"max_new_tokens must be at least 1, but is {length}.")
    if width + length > positions:
        raise InputError(
            f"Prompts of {width} tokens and {length} new ones exceed the model's n_positions = "
            f"{positions}; shorten one of them."
        )
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise InputError(
            "temperature and top_k must not be negative and top_p must be above 0 and at most 1, "
            f"but are {sampling.temperature}, {sampling.top_k} and {sampling.top_p}."
        )
