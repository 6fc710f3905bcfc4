"""Policy gradients without a critic, on groups of responses: GRPO, RLOO, REINFORCE++.

An iteration samples K responses to each prompt, which runs once for all of them, and compares their
scores: those of a group are the baseline of each other. Everything else is a setting: advantages,
ratios, clipping, normalization of the loss, and where the KL to a reference stands, if there is
one.

Shao et al., DeepSeekMath (arXiv:2402.03300); Yu et al., DAPO (arXiv:2503.14476); Liu et al.,
Understanding R1-Zero-Like Training (arXiv:2503.20783); Ahmadian et al., Back to Basics
(arXiv:2402.14740); Hu et al., REINFORCE++ (arXiv:2501.03262).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import ScoredRollout, Sequences
from rlhf_jax.models.interface import Model
from rlhf_jax.rollout.shaping import check_stop_tokens, has_end, scale_scores
from rlhf_jax.training import dynamic_sampling, online
from rlhf_jax.training.epochs import run_epochs
from rlhf_jax.training.grpo_loss import (
    Targets,
    count,
    final_scores,
    policy_loss,
    response_advantages,
    reward_kl,
    selected_tokens,
)
from rlhf_jax.training.grpo_settings import TRAINER, Settings
from rlhf_jax.training.online import make_rollout_step, policy_params, reference_params
from rlhf_jax.training.policy_state import PolicyState, init_state
from rlhf_jax.training.state import make_optimizer

__all__ = [
    "PolicyState",
    "Settings",
    "Targets",
    "init_state",
    "make_rollout_step",
    "make_step",
    "make_update_step",
    "policy_params",
    "reference_params",
]


def make_step(
    model: Model,
    settings: Settings,
    *,
    reward_model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Callable[..., Any]:
    """A pure step (state, batch, key) -> (state, metrics, rollout): a full iteration.

    With several `settings.max_sampling_rounds` it is that of `dynamic_sampling.make_step`.

    Args:
      reward_model: as in `online.make_step`.
      stop_token_ids: tokens that end a response.

    Arrays of the rollout are [B, K, T]; its scores are final: penalised, clipped and scaled. The
    step raises a ValueError while tracing if the state holds no reward model.

    >>> import jax
    >>> from rlhf_jax.batches import PromptBatch
    >>> from rlhf_jax.models.gpt2 import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    >>> key, params = jax.random.key(0), model.init(jax.random.key(1))
    >>> settings = Settings(batch_size=2, num_generations=4, response_length=3)
    >>> scorer = {"model": jax.tree.map(jnp.copy, params), "head": {"kernel": jnp.ones(8)}}
    >>> state = init_state(model, params, settings, key, reward_params=scorer)
    >>> step = jax.jit(make_step(model, settings, stop_token_ids=(9,)), donate_argnums=0)
    >>> batch = PromptBatch(jnp.ones((2, 4), int), jnp.ones((2, 4), bool), jnp.arange(2))
    >>> state, metrics, rollout = step(state, batch, key)
    >>> int(state.step), rollout.tokens.shape
    (1, (2, 4, 3))
    """
    update_step = make_update_step(
        model, settings, optimizer=optimizer, stop_token_ids=stop_token_ids
    )
    return dynamic_sampling.make_step(
        model, settings, update_step, reward_model=reward_model, stop_token_ids=stop_token_ids
    )


def make_update_step(
    model: Model,
    settings: Settings,
    *,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
    reward_weights: Sequence[float] = (1.0,),
) -> online.UpdateStep:
    """A pure (state, batch, rollout, scores, key) -> (state, metrics, rollout).

    Args:
      stop_token_ids: tokens that end a response.
      reward_weights: of R rewards, for "normalize_then_sum". Scores are then f32[B, K, R], NaN
        where a reward does not apply; else they are f32[B, K].

    Metrics, f32[] each, have TRL's names where it has them:

        train/loss, train/grad_norm   means over updates; the norm is that before clipping
        reward, reward_std            of the scores as given, over all responses
        frac_reward_zero_std          share of prompts whose final scores are all equal
        objective/scores              mean of the scores as trained on, where they were changed
        completions/...               lengths in tokens, and the share without an end
        clip_ratio/..., entropy, kl, sampling/...   of `grpo_loss.policy_loss`
        objective/kl                  log(policy / reference), nats per response, with a reference
    """
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)
    check_stop_tokens(settings, stop_token_ids)

    def update_step(state, batch, rollout, scores, key):
        online.check_batch(settings, rollout)
        parts = scores if scores.ndim == 3 else None
        if parts is not None:
            known = jnp.where(jnp.isfinite(parts), parts, 0.0)
            scores = known @ jnp.asarray(reward_weights, jnp.float32)
        valid = rollout.mask.any(axis=-1)
        final = final_scores(settings, stop_token_ids, rollout, scores)
        final, score_stats, scaling = scale_scores(settings, state.score_stats, final, valid)
        ended = has_end(settings, stop_token_ids, rollout)
        scored, states, entropy, exact_kl = _experience(
            model, settings, state, batch, rollout, final
        )
        loss_mask = rollout.actions
        if settings.mask_truncated_completions:
            loss_mask &= ended[..., None]
        advantages = response_advantages(settings, scored, loss_mask, parts, tuple(reward_weights))
        targets = Targets(
            scored,
            advantages,
            loss_mask,
            rollout.logprobs,
            selected_tokens(settings, entropy, loss_mask),
            states,
        )
        params, opt_state, update_metrics = run_epochs(
            functools.partial(_loss, model, settings, state.frozen),
            _count,
            optimizer,
            state.params,
            state.opt_state,
            targets,
            key,
            num_epochs=settings.num_iterations,
            num_minibatches=settings.num_mini_batches,
            accumulation_steps=settings.gradient_accumulation_steps,
        )
        metrics = {**update_metrics, **scaling, **_score_metrics(rollout, scores, final)}
        if settings.changes_scores:
            metrics["objective/scores"] = functional.masked_mean(final, valid)
        metrics |= _length_metrics(rollout, ended) | _kl_metrics(settings, scored, exact_kl)
        metrics["perf/tokens"] += jnp.sum(batch.prompt_mask, dtype=jnp.float32)
        new_state = state._replace(
            step=state.step + 1, params=params, opt_state=opt_state, score_stats=score_stats
        )
        if advantages.ndim == 2:
            advantages = jnp.where(rollout.actions, advantages[..., None], 0.0)
        return new_state, metrics, scored._replace(advantages=advantages)

    return update_step


def _experience(model, settings, state, batch, rollout, scores):
    """(scored rollout, frozen states, entropy, exact KL), as far as the settings need them."""
    sequences = Sequences(batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
    states, entropy, exact_kl, (logprobs, ref_logprobs, _) = online.score_passes(
        model, settings, state, sequences, with_policy=settings.scores_policy
    )
    logprobs = rollout.logprobs if logprobs is None else logprobs
    if rollout.acted is not None:  # what an environment wrote has no KL
        logprobs, ref_logprobs, exact_kl = (
            None if x is None else jnp.where(rollout.acted, x, 0.0)
            for x in (logprobs, ref_logprobs, exact_kl)
        )
    scored = ScoredRollout(*sequences, logprobs, ref_logprobs, None, scores)
    return scored, states, entropy, exact_kl


def _loss(model, settings, frozen, params, batch, key, counts):
    del key
    targets, _ = batch
    logprobs, entropy, _ = online.policy_logprobs(model, settings, params, frozen, targets)
    return policy_loss(settings, logprobs, entropy, targets, counts)


def _count(batch):
    targets, _ = batch
    return count(targets)


def _score_metrics(rollout, scores, final):
    """Of f32[B, K] scores, as given and as trained on; padding of the batch is left out."""
    valid = rollout.mask.any(axis=-1)
    metrics = {
        "reward": functional.masked_mean(scores.astype(jnp.float32), valid),
        "reward_std": jnp.sqrt(functional.masked_var(scores.astype(jnp.float32), valid)),
    }
    if scores.shape[1] > 1:
        lowest = jnp.min(final, axis=1, where=valid, initial=jnp.inf)
        highest = jnp.max(final, axis=1, where=valid, initial=-jnp.inf)
        is_equal = (highest <= lowest).astype(jnp.float32)
        metrics["frac_reward_zero_std"] = functional.masked_mean(is_equal, valid.any(axis=1))
    return metrics


def _length_metrics(rollout, ended):
    """Lengths in sampled tokens, all and of responses that ended, and the share of the others."""
    lengths = jnp.sum(rollout.actions, axis=-1).astype(jnp.float32)
    valid = lengths > 0
    metrics: online.Metrics = {}
    for name, mask in (("", valid), ("terminated_", valid & ended)):
        lowest = jnp.min(lengths, where=mask, initial=jnp.inf)
        metrics |= {
            f"completions/mean_{name}length": functional.masked_mean(lengths, mask),
            f"completions/min_{name}length": jnp.where(jnp.any(mask), lowest, 0.0),
            f"completions/max_{name}length": jnp.max(lengths, where=mask, initial=0.0),
        }
    clipped = functional.masked_mean((~ended).astype(jnp.float32), valid)
    return metrics | {"completions/clipped_ratio": clipped, "perf/tokens": jnp.sum(lengths)}


def _kl_metrics(settings, scored, exact_kl):
    """Of the KL to the reference, if there is one, before the updates."""
    metrics: online.Metrics = {}
    valid = scored.mask.any(axis=-1)
    if settings.has_kl_in_reward:
        metrics["kl"] = reward_kl(settings, scored)
    if settings.has_reference and (settings.scores_policy or settings.samples_all):
        total = jnp.sum(scored.logprobs - scored.ref_logprobs, axis=-1)
        metrics["objective/kl"] = functional.masked_mean(total, valid)
    if exact_kl is not None:
        total = jnp.sum(jnp.where(scored.mask, exact_kl, 0.0), axis=-1)
        metrics["objective/kl_exact"] = functional.masked_mean(total, valid)
    return metrics
