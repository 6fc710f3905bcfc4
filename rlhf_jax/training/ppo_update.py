"""From scored responses to new parameters: advantages, then epochs of clipped updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import ScoredRollout
from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import response_hidden
from rlhf_jax.training.ppo_settings import Settings
from rlhf_jax.training.state import apply_gradients


class Experience(NamedTuple):
    """What the epochs read.

    Attributes:
      rollout: the responses with all that was scored.
      advantages: f32[B, T], whitened, 0 off the mask.
      returns: f32[B, T], what the values should be, 0 off the mask.
    """

    rollout: ScoredRollout
    advantages: jax.Array
    returns: jax.Array


def make_experience(settings: Settings, scored: ScoredRollout, rewards: jax.Array) -> Experience:
    """Whitened advantages, after the returns were taken from the unwhitened ones."""
    mask = scored.mask
    if settings.whiten_rewards:
        rewards = functional.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = functional.gae(
        rewards, scored.values, mask, gamma=settings.gamma, lam=settings.lam
    )
    return Experience(scored, functional.masked_whiten(advantages, mask), returns)


def run_epochs(
    model: Model,
    settings: Settings,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: Any,
    experience: Experience,
    key: jax.Array,
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """Epochs x minibatches of clipped updates, as one scan; (params, opt_state, metrics)."""
    rows, minibatches = settings.batch_size, settings.num_mini_batches
    if experience.returns.shape[0] != rows:
        raise ValueError(
            f"the batch has {experience.returns.shape[0]} rows, but ppo.batch_size is {rows}."
        )
    epoch_keys = jax.random.split(key, settings.num_ppo_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, rows))(epoch_keys)
    order = order.reshape(settings.num_ppo_epochs * minibatches, rows // minibatches)

    def update(carry, indices):
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[indices], experience)
        grads, metrics = jax.grad(_loss, has_aux=True)(params, model, settings, minibatch)
        params, opt_state, norm = apply_gradients(optimizer, params, opt_state, grads)
        return (params, opt_state), {**metrics, "train/grad_norm": norm}

    (params, opt_state), metrics = jax.lax.scan(update, (params, opt_state), order)
    ratio_var = jnp.var(metrics["val/ratio"])
    metrics = {name: jnp.mean(values) for name, values in metrics.items()}
    return params, opt_state, {**metrics, "val/ratio_var": ratio_var}


def _loss(params, model, settings, minibatch):
    """Policy loss + vf_coef * value loss of one minibatch, and its metrics."""
    rollout = minibatch.rollout
    parts = (rollout.prompts, rollout.prompt_mask, rollout.tokens, rollout.mask)
    hidden = response_hidden(model, params["model"], *parts)
    logits = model.logits(params["model"], hidden) / settings.temperature
    policy_loss, policy = functional.ppo_policy_loss(
        functional.token_logprobs(logits, rollout.tokens),
        rollout.logprobs,
        minibatch.advantages,
        rollout.mask,
        clip_range=settings.cliprange,
    )
    value_loss, value = functional.ppo_value_loss(
        apply_head(params["value_head"], hidden),
        rollout.values,
        minibatch.returns,
        rollout.mask,
        clip_range=settings.cliprange_value,
    )
    metrics = {
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        "policy/approxkl_avg": policy["approxkl"],
        "policy/clipfrac_avg": policy["clipfrac"],
        "val/clipfrac_avg": value["clipfrac"],
        "val/ratio": policy["ratio"],
    }
    return policy_loss + settings.vf_coef * value_loss, metrics
