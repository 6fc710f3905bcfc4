"""The value function of PPO: a head on the policy, or a model of its own."""

import jax
import jax.numpy as jnp

from rlhf_jax.batches import Sequences
from rlhf_jax.errors import InputError
from rlhf_jax.models.heads import apply_head, init_value_head
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import response_hidden
from rlhf_jax.training import trainable
from rlhf_jax.training.ppo_settings import Settings
from rlhf_jax.training.trainable import Trainable


def init_values(settings: Settings, model: Model, policy: Params, start: Params | None) -> Params:
    """The trained parameters of the value function, by `settings.value_model`.

    {"value_head": a head of zeros} or {"value_model": {"model": ..., "head": ...}}.

    Args:
      policy: the trained part of the policy, which "policy" copies.
      start: {"model": ..., "head": ...} of a reward model, which "reward" copies.

    Raises:
      InputError: there is no reward model to start from.
    """
    head = init_value_head(model.config.n_embd)
    if settings.value_model == "shared":
        return {"value_head": head}
    if settings.value_model == "policy":
        own = jax.tree.map(jnp.copy, model.without_unembedding(policy))
        return {"value_model": {"model": own, "head": head}}
    if start is None:
        raise InputError(
            "ppo.value_model reward needs a reward model in JAX to start from: give value_params "
            "or reward_params to init_state, or set ppo.value_model to policy or shared."
        )
    copy = jax.tree.map(jnp.copy, start)
    bias = jnp.zeros((), jnp.float32)
    return {"value_model": {"model": copy["model"], "head": {"bias": bias, **copy["head"]}}}


def value_architecture(settings: Settings, model: Model, value_model: Model | None) -> Model:
    """The model that computes the values: the policy's, or for "reward" `value_model`.

    Raises:
      InputError: its vocabulary is smaller than the policy's.
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


def response_values(
    settings: Settings,
    value_model: Model,
    params: Params,
    frozen: Params,
    sequences: Sequences,
    hidden: jax.Array,
    states: jax.Array | None,
) -> jax.Array:
    """f32[B, T]: values of the states in which the response tokens are chosen.

    Args:
      value_model: the result of `value_architecture`.
      params, frozen: `state.params` and `state.frozen`.
      hidden: [B, T, D] of the policy, which the head of "shared" reads.
      states: `frozen_states` of the policy, which "policy" shares; None without frozen layers.
    """
    if settings.value_model == "shared":
        return apply_head(params["value_head"], hidden)
    own, shared, base = params["value_model"], None, None
    if settings.value_model == "policy":
        shared, base = states, frozen.get("base")
    upper, _ = trainable.stacks(Trainable(own["model"], base))
    own_hidden = response_hidden(value_model, upper, sequences, states=shared)
    return apply_head(own["head"], own_hidden)
