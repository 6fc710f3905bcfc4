"""Parts of losses on preferences: the state with a reference, log-probabilities of responses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.batches import Sequences
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import all_logprobs, response_logprobs
from rlhf_jax.training import trainable
from rlhf_jax.training.settings import ReferenceSettings
from rlhf_jax.training.state import TrainState, init_train_state
from rlhf_jax.training.trainable import Trainable


class Logprobs(NamedTuple):
    """Log-probabilities of responses, in nats.

    Attributes:
      tokens: f32[B, K, T] or f32[B, T], 0 off the mask.
      mask: bool, of the same shape.
      hidden: [..., T, D] in which each token is chosen.
      prompt_tokens: f32[B, P - 1], of the tokens of prompts after the first, 0 off their mask; None
        where they are not computed.
      prompt_mask: bool[B, P - 1].
    """

    tokens: jax.Array
    mask: jax.Array
    hidden: jax.Array
    prompt_tokens: jax.Array | None = None
    prompt_mask: jax.Array | None = None

    @property
    def lengths(self) -> jax.Array:
        """i32[B, K] or i32[B]: the number of tokens of each response."""
        return jnp.sum(self.mask, axis=-1, dtype=jnp.int32)

    @property
    def sums(self) -> jax.Array:
        """f32[B, K] or f32[B]: the sums over the tokens of each response."""
        return jnp.sum(self.tokens, axis=-1)

    @property
    def means(self) -> jax.Array:
        """The means over tokens; 0 of a response without any."""
        return self.sums / jnp.maximum(self.lengths, 1.0)


def init_state_with_reference(
    model: Model,
    params: Params,
    settings: ReferenceSettings,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step, with a reference where the steps have to compute with it.

    The state holds `params` themselves: a step that donates it consumes them. The reference is a
    copy of their trained part, or the base of fresh adapters, without `precompute_ref`.

    Args:
      params: the model's full parameters.

    Raises:
      InputError: more layers are to be trained than the model has.
    """
    trained, frozen = trainable.split(model, params, settings.num_layers_unfrozen, settings.section)
    state = init_train_state(trained, optimizer, frozen)
    if not settings.has_reference or settings.precompute_ref:
        return state
    return state._replace(reference=trainable.reference_part(model, trained))


def logprobs_of(
    model: Model,
    params: Trainable,
    sequences: Sequences,
    states: jax.Array | None = None,
    *,
    with_prompts: bool = False,
) -> Logprobs:
    """Log-probabilities of responses at temperature 1, without dropout.

    Args:
      states: `trainable.frozen_states` of these sequences, if they are computed already.
      with_prompts: whether log-probabilities of the prompts are computed in the same pass.
    """
    upper, lower = trainable.stacks(params)
    mask = sequences.mask
    if with_prompts:
        prompt_tokens, prompt_mask, tokens, hidden = all_logprobs(
            model, upper, sequences, frozen=lower, states=states
        )
        before = jnp.where(prompt_mask, prompt_tokens, 0.0)
        return Logprobs(jnp.where(mask, tokens, 0.0), mask, hidden, before, prompt_mask)
    tokens, _, hidden = response_logprobs(
        model, upper, sequences, temperature=1.0, frozen=lower, states=states
    )
    return Logprobs(jnp.where(mask, tokens, 0.0), mask, hidden)


def preference_metrics(rewards: jax.Array, logps: jax.Array, beta: float) -> dict[str, jax.Array]:
    """f32[B] each, of pairs, under TRL's names.

    Args:
      rewards: f32[B, 2], of the chosen and the rejected responses: beta times their log-ratios.
      logps: f32[B, 2], their log-probabilities in nats.
      beta: the factor of the rewards.
    """
    size = beta * jnp.max(jnp.abs(logps), axis=1)
    return {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": rewards[:, 0] - rewards[:, 1],
        "rewards/accuracies": exceeds(rewards[:, 0], rewards[:, 1], size),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }


def exceeds(first: jax.Array, second: jax.Array, size: jax.Array) -> jax.Array:
    """bool: first > second by more than the rounding of sums of this size, 2^-19 of it.

    Before the first step policy and reference differ by the rounding of two compiled programs.
    """
    return first - second > 2.0**-19 * jnp.abs(size)
