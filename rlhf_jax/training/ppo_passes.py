"""The passes of PPO over responses: those of the policy, of the reference and of the values.

With `num_layers_unfrozen` the lower layers and the embeddings are frozen, and stand once in the
state, as `frozen["trunk"]`. They are run once per rollout; what they give is the input of the upper
layers, of which policy, reference and a value model each have their own, in every pass of every
epoch. Without it there is no trunk, and each pass begins with the tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.batches import PromptBatch, Rollout, ScoredRollout
from rlhf_jax.errors import InputError
from rlhf_jax.models.heads import apply_head, init_value_head
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import frozen_states, response_hidden
from rlhf_jax.training.accumulate import map_microbatches
from rlhf_jax.training.frozen import full_params
from rlhf_jax.training.ppo_settings import Settings


def policy_params(model: Model, state: Any) -> Params:
    """The policy's whole parameters in a `PPOState`: what generates, and what is exported."""
    return full_params(model, state.frozen.get("trunk"), state.params["model"])


def reference_params(model: Model, state: Any) -> Params:
    """The reference's whole parameters in a `PPOState`."""
    return full_params(model, state.frozen.get("trunk"), state.frozen["ref"])


def init_value(settings: Settings, model: Model, policy: Params, start: Params | None) -> Params:
    """The part of the trained parameters that gives the values, as `settings.value_model` says.

    Args:
      policy: the trained half of the policy.
      start: {"model": ..., "head": ...} of a reward model; what "reward" starts from.

    Returns:
      {"value_head": a head that is zero} or {"value_model": {"model": ..., "head": ...}}, in copies
      of what was given.

    Raises:
      InputError: there is no reward model to start from.
    """
    head = init_value_head(model.config.n_embd)
    if settings.value_model == "shared":
        return {"value_head": head}
    if settings.value_model == "policy":
        return {"value_model": {"model": jax.tree.map(jnp.copy, policy), "head": head}}
    if start is None:
        raise InputError(
            "ppo.value_model reward needs a reward model in JAX to start from: give value_params "
            "or reward_params to init_state, or set ppo.value_model to policy or shared."
        )
    copy = jax.tree.map(jnp.copy, start)
    bias = jnp.zeros((), jnp.float32)
    return {"value_model": {"model": copy["model"], "head": {"bias": bias, **copy["head"]}}}


def value_form(settings: Settings, model: Model, value_model: Model | None) -> Model:
    """The form of the network that gives the values.

    Raises:
      InputError: it does not know all tokens of the policy.
    """
    if settings.value_model != "reward" or value_model is None:
        return model
    ours, theirs = model.config.vocab_size, value_model.config.vocab_size
    if theirs < ours:
        raise InputError(
            f"ppo.value_model reward needs a reward model with the policy's vocabulary, but it has "
            f"a vocab_size of {theirs} and the policy one of {ours}; use one that was trained with "
            "the policy's tokenizer."
        )
    return value_model


def response_logprobs(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    temperature: float,
    trunk: Params | None = None,
    lower: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprobs f32[B, T], entropy f32[B, T], hidden [B, T, D]) of the response tokens, in nats.

    Args:
      params: whole, or, where `trunk` and `lower` are given, the upper half.
      trunk: the frozen lower half.
      lower: what `frozen_states` made of the same rows with it.
    """
    hidden = response_hidden(model, params, prompts, prompt_mask, tokens, mask, lower=lower)
    logits = response_logits(model, params, hidden, temperature=temperature, trunk=trunk)
    return (
        functional.token_logprobs(logits, tokens),
        functional.token_entropy(logits),
        hidden,
    )


def response_logits(
    model: Model,
    params: Params,
    hidden: jax.Array,
    *,
    temperature: float,
    trunk: Params | None = None,
) -> jax.Array:
    """f32[..., Vp] of hidden states over the temperature, -inf from V on; arguments as above."""
    return model.padded_logits(full_params(model, trunk, params), hidden) / temperature


def response_values(
    settings: Settings,
    value_model: Model,
    params: Params,
    parts: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    *,
    hidden: jax.Array,
    lower: jax.Array | None,
) -> jax.Array:
    """f32[B, T]: values of the states in which the response tokens are chosen.

    Args:
      value_model: what `value_form` gives.
      params: all that is trained.
      parts: prompts, prompt_mask, tokens, mask.
      hidden: [B, T, D] of the policy, which the head of "shared" reads.
      lower: what the frozen layers made of the rows, which "policy" shares; None without them.
    """
    if settings.value_model == "shared":
        return apply_head(params["value_head"], hidden)
    own = params["value_model"]
    shared = lower if settings.value_model == "policy" else None
    return apply_head(own["head"], response_hidden(value_model, own["model"], *parts, lower=shared))


def score_rollout(
    model: Model,
    value_model: Model,
    settings: Settings,
    state: Any,
    batch: PromptBatch,
    rollout: Rollout,
    scores: jax.Array,
) -> tuple[ScoredRollout, jax.Array | None, jax.Array, jax.Array | None]:
    """(ScoredRollout, lower states, entropy, KL): policy, value and reference on sampled tokens.

    The lower states are None without a frozen trunk. Entropy and KL, over the whole vocabulary, are
    f32[B, T] and not 0 off the mask; the KL is None unless asked for.

    The policy's log-probs are computed anew rather than taken from sampling: the pass is needed for
    the values, and the first ratios are then 1 but for the rounding of another batch shape. With
    `settings.score_batch_size` so many rows are run at a time.
    """
    rows = (batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
    passes = functools.partial(_passes, model, value_model, settings, state)
    lower, entropy, exact_kl, per_token = map_microbatches(passes, rows, settings.num_score_parts)
    logprobs, ref_logprobs, values = (jnp.where(rollout.mask, x, 0.0) for x in per_token)
    scored = ScoredRollout(*rows, logprobs, ref_logprobs, values, scores)
    return scored, lower, entropy, exact_kl


def _passes(model, value_model, settings, state, rows):
    """(lower states, entropy, KL, (logprobs, reference logprobs, values)) of rows."""
    policy, ref, trunk = state.params["model"], state.frozen["ref"], state.frozen.get("trunk")
    lower = None if trunk is None else frozen_states(model, trunk, *rows)
    logprobs, entropy, hidden = response_logprobs(
        model, policy, *rows, temperature=settings.temperature, trunk=trunk, lower=lower
    )
    ref_logprobs, _, ref_hidden = response_logprobs(
        model, ref, *rows, temperature=settings.temperature, trunk=trunk, lower=lower
    )
    exact_kl = None
    if settings.exact_kl:
        # The same logits as those above, which are there once when compiled.
        logits, ref_logits = (
            response_logits(model, params, x, temperature=settings.temperature, trunk=trunk)
            for params, x in ((policy, hidden), (ref, ref_hidden))
        )
        exact_kl = functional.token_kl(logits, ref_logits)
    values = response_values(settings, value_model, state.params, rows, hidden=hidden, lower=lower)
    return lower, entropy, exact_kl, (logprobs, ref_logprobs, values)
