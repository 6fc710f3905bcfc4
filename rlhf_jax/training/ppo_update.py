"""From scored responses to new parameters: advantages, then epochs of updates."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import ScoredRollout, TextBatch
from rlhf_jax.functional.masking import batch_mean
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import response_hidden
from rlhf_jax.training.accumulate import accumulated_gradients
from rlhf_jax.training.ppo_passes import response_logits, response_values
from rlhf_jax.training.ppo_ptx import count_text_tokens, text_minibatches, with_ptx
from rlhf_jax.training.ppo_settings import Settings
from rlhf_jax.training.state import apply_gradients


class Experience(NamedTuple):
    """What the epochs read.

    Attributes:
      rollout: the responses with all that was scored.
      advantages: f32[B, T], whitened, 0 off the mask.
      returns: f32[B, T], what the values should be, 0 off the mask.
      lower: [B, P + T - 1, D], what the frozen layers made of the rows; None without any.
    """

    rollout: ScoredRollout
    advantages: jax.Array
    returns: jax.Array
    lower: jax.Array | None = None


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
    *,
    penalty_coef: jax.Array | None = None,
    texts: TextBatch | None = None,
    value_model: Model | None = None,
    trunk: Params | None = None,
) -> tuple[Params, Any, dict[str, jax.Array]]:
    """Epochs x minibatches of updates, as one scan; (params, opt_state, metrics).

    Args:
      params: what is trained, as in `PPOState.params`.
      penalty_coef: f32[], of the surrogate "kl_penalty".
      texts: of PPO-ptx, for `ptx_coef`.
      value_model: the form of a value model that is not the policy's.
      trunk: the frozen half of the policy, with `experience.lower`; None without any.

    Raises:
      ValueError: the experience has not `batch_size` rows, or the texts not theirs.
    """
    rows, minibatches = settings.batch_size, settings.num_mini_batches
    if experience.returns.shape[0] != rows:
        raise ValueError(
            f"the batch has {experience.returns.shape[0]} rows, but ppo.batch_size is {rows}."
        )
    epoch_keys = jax.random.split(key, settings.num_ppo_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, rows))(epoch_keys)
    order = order.reshape(settings.num_ppo_epochs * minibatches, rows // minibatches)
    parts = (order, text_minibatches(settings, texts, key))
    loss = functools.partial(
        _loss,
        model=model,
        settings=settings,
        value_model=value_model or model,
        trunk=trunk,
        penalty_coef=penalty_coef,
    )
    steps = settings.gradient_accumulation_steps
    update = functools.partial(_update, loss, steps, optimizer, experience)
    if settings.max_approxkl is not None:
        return _update_until(update, settings.max_approxkl, (params, opt_state), parts)
    (params, opt_state), metrics = jax.lax.scan(update, (params, opt_state), parts)
    ratio_var = jnp.var(metrics["val/ratio"])
    metrics = {name: jnp.mean(values) for name, values in metrics.items()}
    return params, opt_state, {**metrics, "val/ratio_var": ratio_var}


def _update_until(update, max_approxkl, carry, parts):
    """Updates until a minibatch has moved further than max_approxkl, whose own is left out too.

    Metrics are means over the minibatches until then, and that one.
    """
    take = functools.partial(_update_if_near, update, max_approxkl)
    leave = functools.partial(_no_update, take)

    def step(carry, part):
        carry, is_on = carry
        carry, is_taken, metrics = jax.lax.cond(is_on, take, leave, carry, part)
        return (carry, is_taken), (metrics, is_on, is_taken)

    start = (carry, jnp.ones((), bool))
    ((params, opt_state), _), (metrics, measured, taken) = jax.lax.scan(step, start, parts)
    ratio_var = functional.masked_var(metrics["val/ratio"], measured, unbiased=False)
    metrics = {name: functional.masked_mean(x, measured) for name, x in metrics.items()}
    metrics |= {"val/ratio_var": ratio_var, "policy/updates": jnp.mean(taken, dtype=jnp.float32)}
    return params, opt_state, metrics


def _update_if_near(update, max_approxkl, carry, part):
    """(carry, whether it was updated, metrics) of one minibatch."""
    updated, metrics = update(carry, part)
    is_near = metrics["policy/approxkl_avg"] <= max_approxkl
    carry = jax.tree.map(lambda new, old: jnp.where(is_near, new, old), updated, carry)
    return carry, is_near, metrics


def _no_update(take, carry, part):
    """The form of what `take` gives, and nothing of its work."""
    metrics = jax.eval_shape(take, carry, part)[2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
    return carry, jnp.zeros((), bool), zeros


def _update(loss, steps, optimizer, experience, carry, part):
    """One update on the rows of some indices, and texts: ((params, opt_state), metrics)."""
    (params, opt_state), (indices, texts) = carry, part
    minibatch = jax.tree.map(lambda x: x[indices], experience)
    grads, metrics = accumulated_gradients(loss, _count, params, (minibatch, texts), None, steps)
    params, opt_state, norm = apply_gradients(optimizer, params, opt_state, grads)
    return (params, opt_state), {**metrics, "train/grad_norm": norm}


def _count(batch):
    """(f32[] tokens of responses, f32[] tokens of texts) that the losses are means over."""
    minibatch, texts = batch
    tokens = jnp.sum(minibatch.rollout.mask, dtype=jnp.float32)
    return tokens, None if texts is None else count_text_tokens(texts)


def _loss(params, batch, key, denominators, *, model, settings, value_model, trunk, penalty_coef):
    """Policy loss + vf_coef * value loss - entropy_coef * entropy + ptx_coef * texts; metrics."""
    del key
    (minibatch, texts), (count, text_count) = batch, denominators or (None, None)
    rollout = minibatch.rollout
    parts = (rollout.prompts, rollout.prompt_mask, rollout.tokens, rollout.mask)
    hidden = response_hidden(model, params["model"], *parts, lower=minibatch.lower)
    logits = response_logits(
        model, params["model"], hidden, temperature=settings.temperature, trunk=trunk
    )
    logprobs = functional.token_logprobs(logits, rollout.tokens)
    policy_loss, policy_metrics = _policy_loss(settings, logprobs, minibatch, penalty_coef, count)
    value_loss, value = functional.ppo_value_loss(
        response_values(settings, value_model, params, parts, hidden=hidden, lower=minibatch.lower),
        rollout.values,
        minibatch.returns,
        rollout.mask,
        clip_range=settings.cliprange_value,
        denominator=count,
    )
    loss = policy_loss + settings.vf_coef * value_loss
    metrics = {
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        **policy_metrics,
        "val/clipfrac_avg": value["clipfrac"],
    }
    if settings.entropy_coef:
        entropy_loss = -batch_mean(functional.token_entropy(logits), rollout.mask, count)
        loss += settings.entropy_coef * entropy_loss
        metrics["loss/entropy_avg"] = entropy_loss
    policy = params["model"]
    return with_ptx(
        settings, model, policy, texts, loss, metrics, trunk=trunk, denominator=text_count
    )


def _policy_loss(settings, logprobs, minibatch, penalty_coef, count):
    """(loss, metrics) of the surrogate that the settings name."""
    rollout = minibatch.rollout
    arrays = (logprobs, rollout.logprobs, minibatch.advantages, rollout.mask)
    if settings.surrogate == "clip":
        loss, policy = functional.ppo_policy_loss(
            *arrays, clip_range=settings.cliprange, denominator=count
        )
        return loss, {
            "policy/approxkl_avg": policy["approxkl"],
            "policy/clipfrac_avg": policy["clipfrac"],
            "val/ratio": policy["ratio"],
        }
    if penalty_coef is None:
        raise ValueError("the state holds no penalty_coef: make it with the same settings.")
    loss, policy = functional.kl_penalty_policy_loss(
        *arrays, kl_coef=penalty_coef, denominator=count
    )
    halved_squares = functional.kl_estimate(logprobs, rollout.logprobs, "k2")
    return loss, {
        "policy/approxkl_avg": batch_mean(halved_squares, rollout.mask, count),
        "val/ratio": policy["ratio"],
    }
