"""Online DPO: direct preference optimization on responses of the policy itself.

An iteration samples K responses to each prompt, which runs once for all of them, and prefers the
one with the highest score to the one with the lowest. Log-probabilities are those at the sampling
temperature, of the policy and of the reference, which is the policy that the run begins with.

Guo et al., Direct Language Model Alignment from Online AI Feedback (arXiv:2402.04792); best against
worst of more than two: Dong et al., RLHF Workflow (arXiv:2405.07863).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import ScoredRollout
from rlhf_jax.functional.masking import batch_mean
from rlhf_jax.models.interface import Model
from rlhf_jax.rollout.shaping import check_stop_tokens, has_end
from rlhf_jax.training import online
from rlhf_jax.training.epochs import run_epochs
from rlhf_jax.training.online import make_rollout_step, policy_params, reference_params
from rlhf_jax.training.online_dpo_settings import TRAINER, Settings
from rlhf_jax.training.policy_state import PolicyState, init_state
from rlhf_jax.training.responses import preference_metrics
from rlhf_jax.training.state import make_optimizer

__all__ = [
    "Pairs",
    "Settings",
    "best_and_worst",
    "init_state",
    "make_rollout_step",
    "make_step",
    "make_update_step",
    "policy_params",
    "reference_params",
]


class Pairs(NamedTuple):
    """The best and the worst response to each prompt, arrays [B, ...].

    Attributes:
      rollout: with arrays of tokens [B, 2, T] and scores f32[B, 2], the best one first.
      states: [B, P + 2 * (T - 1), D], of `online.Experience`.
      is_pair: bool[B], whether one response is better than another that differs in its tokens.
    """

    rollout: ScoredRollout
    states: jax.Array | None
    is_pair: jax.Array


def make_step(
    model: Model,
    settings: Settings,
    *,
    reward_model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> online.Step:
    """A pure step (state, batch, key) -> (state, metrics, rollout): a full iteration.

    Example, arguments and errors are those of `grpo.make_step`, with `settings.num_responses` for
    K; the rollout has all K responses, [B, K, T].
    """
    update_step = make_update_step(
        model, settings, optimizer=optimizer, stop_token_ids=stop_token_ids
    )
    return online.make_step(
        model, settings, update_step, reward_model=reward_model, stop_token_ids=stop_token_ids
    )


def make_update_step(
    model: Model,
    settings: Settings,
    *,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> online.UpdateStep:
    """A pure (state, batch, rollout, scores f32[B, K], key) -> (state, metrics, rollout).

    Metrics, f32[] each, have the names of TRL where it has them. Those of the shared parts of an
    iteration, `objective/...`, are means over all responses; their KL penalty has the weight beta.
    The others are means over pairs and updates:

        train/loss, train/grad_norm     the norm is that before clipping
        rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies,
        logps/chosen, logps/rejected    as in `dpo.make_step`, at the sampling temperature
        objective/scores_margin         score of the best minus that of the worst response, a mean
                                        over prompts
        objective/ties                  share of prompts without a pair
        val/contain_eos_token           share of responses that EOS or `truncate_token` ended
        beta
    """
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)
    check_stop_tokens(settings, stop_token_ids)

    def update_step(state, batch, rollout, scores, key):
        experience, score_stats, metrics = online.make_experience(
            model,
            settings,
            state,
            batch,
            rollout,
            scores,
            kl_coef=settings.beta,
            stop_token_ids=stop_token_ids,
            score_stats=state.score_stats,
        )
        pairs = best_and_worst(experience)
        params, opt_state, update_metrics = run_epochs(
            functools.partial(_loss, model, settings, state.frozen),
            _count,
            optimizer,
            state.params,
            state.opt_state,
            pairs,
            key,
            num_epochs=settings.num_epochs,
            num_minibatches=settings.num_mini_batches,
            accumulation_steps=settings.gradient_accumulation_steps,
        )
        ended = has_end(settings, stop_token_ids, rollout)
        metrics = {**metrics, **update_metrics, **_ranking_metrics(pairs, rollout, ended)}
        metrics["beta"] = metrics.pop("objective/kl_coef")
        new_state = PolicyState(state.step + 1, params, opt_state, state.frozen, score_stats)
        return new_state, metrics, experience.rollout

    return update_step


def best_and_worst(experience: online.Experience) -> Pairs:
    """The responses with the highest and the lowest score; of equal scores the first ones."""
    scored, states = experience.rollout, experience.states
    index = jnp.stack([jnp.argmax(scored.scores, axis=1), jnp.argmin(scored.scores, axis=1)], 1)

    def chosen(x):
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

    pairs = scored._replace(
        tokens=chosen(scored.tokens),
        mask=chosen(scored.mask),
        logprobs=chosen(scored.logprobs),
        ref_logprobs=chosen(scored.ref_logprobs),
        scores=chosen(scored.scores),
    )
    differ = (pairs.tokens[:, 0] != pairs.tokens[:, 1]) | (pairs.mask[:, 0] != pairs.mask[:, 1])
    is_pair = (pairs.scores[:, 0] > pairs.scores[:, 1]) & jnp.any(differ, axis=1)
    if states is not None:
        (batch, count, length), width = scored.tokens.shape, scored.prompts.shape[1]
        dim = states.shape[-1]
        rest = chosen(states[:, width:].reshape(batch, count, length - 1, dim))
        rest = rest.reshape(batch, 2 * (length - 1), dim)
        states = jnp.concatenate([states[:, :width], rest], axis=1)
    return Pairs(pairs, states, is_pair)


def _loss(model, settings, frozen, params, batch, key, denominator):
    """(loss, metrics): means over pairs, or sums over the denominator."""
    del key
    pairs, _ = batch
    logprobs, _, _ = online.policy_logprobs(model, settings, params, frozen, pairs)
    logps = jnp.sum(jnp.where(pairs.rollout.mask, logprobs, 0.0), axis=-1)
    ref_logps = jnp.sum(pairs.rollout.ref_logprobs, axis=-1)
    loss, _ = functional.dpo_loss(
        *(logps[:, 0], logps[:, 1], ref_logps[:, 0], ref_logps[:, 1]),
        beta=settings.beta,
        kind=settings.kind,
        label_smoothing=settings.label_smoothing,
        mask=pairs.is_pair,
        denominator=denominator,
    )
    rewards = settings.beta * (logps - ref_logps)
    values = preference_metrics(rewards, logps, settings.beta)
    means = {name: batch_mean(x, pairs.is_pair, denominator) for name, x in values.items()}
    return loss, {"train/loss": loss, **means}


def _count(batch):
    """f32[]: pairs that the loss is a mean over."""
    pairs, _ = batch
    return jnp.sum(pairs.is_pair, dtype=jnp.float32)


def _ranking_metrics(pairs, rollout, ended):
    """Means over prompts and responses; padding of the batch is left out."""
    valid, scores = rollout.mask.any(axis=-1), pairs.rollout.scores
    prompts = valid.any(axis=1)
    ties = (~pairs.is_pair).astype(jnp.float32)
    return {
        "objective/scores_margin": functional.masked_mean(scores[:, 0] - scores[:, 1], prompts),
        "objective/ties": functional.masked_mean(ties, prompts),
        "val/contain_eos_token": functional.masked_mean(ended.astype(jnp.float32), valid),
    }
