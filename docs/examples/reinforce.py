"""REINFORCE with a moving baseline: a complete online trainer in one file (Williams 1992).

One update for each batch of sampled responses:

    loss     = -mean over tokens of A_t * log pi(token_t)
    A_t      = R_t - baseline,   R_t = sum of the token rewards from t on
    baseline = decay * baseline + (1 - decay) * mean over responses of R_0

with PPO's token rewards: a KL penalty towards the reference, and the score on the last token.
Sampling, scoring, rewards and the full step are those of `training.online`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.checks import FractionBelowOne
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.shaping import ScoreStats, init_score_stats
from rlhf_jax.training import online
from rlhf_jax.training.epochs import run_epochs
from rlhf_jax.training.settings import OnlineSettings, OptimizerSettings
from rlhf_jax.training.state import make_optimizer
from rlhf_jax.training.trainer import Headline, Trainer


@dataclasses.dataclass(frozen=True)
class Settings(OnlineSettings):
    """The section `reinforce` of a configuration.

    Attributes:
      baseline_decay: of the moving average of returns.
    """

    section = "reinforce"
    baseline_decay: FractionBelowOne = 0.9


TRAINER = Trainer(
    name="reinforce",
    title="REINFORCE",
    label="REINFORCE",
    summary="REINFORCE with a moving baseline",
    settings=Settings,
    reads=lambda settings: "prompts",
    online=True,
    optimizer=OptimizerSettings(learning_rate=1e-5),
    headlines=(Headline("objective/scores", "score"), Headline("objective/kl", "KL", False)),
    losses=("loss/policy_avg", "train/grad_norm"),
    module=__name__,  # not needed for a file in rlhf_jax/training
)


class State(NamedTuple):
    """Everything that an exact continuation needs; `params` and `frozen` as in `online`."""

    step: jax.Array  # i32[], iterations done
    params: Params
    opt_state: Any
    frozen: Params
    baseline: jax.Array  # f32[]
    score_stats: ScoreStats | None  # of the setting `scale_reward`


def init_state(
    model: Model,
    params: Params,
    settings: Settings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
    ref_params: Params | None = None,
    reward_params: Params | None = None,
) -> State:
    """The state before the first iteration."""
    del key  # nothing is random
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)
    policy, frozen = online.split_policy(
        model, params, settings, ref_params=ref_params, reward_params=reward_params
    )
    trained = {"model": policy}
    step, baseline = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    score_stats = init_score_stats(settings)
    return State(step, trained, optimizer.init(trained), frozen, baseline, score_stats)


def make_update_step(
    model: Model,
    settings: Settings,
    *,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> online.UpdateStep:
    """A pure (state, batch, rollout, scores f32[B], key) -> (state, metrics, rollout)."""
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)

    make_experience = functools.partial(
        online.make_experience, model, settings, stop_token_ids=stop_token_ids
    )

    def update_step(state, batch, rollout, scores, key):
        experience, score_stats, metrics = make_experience(
            state, batch, rollout, scores, kl_coef=settings.kl_coef, score_stats=state.score_stats
        )
        returns = functional.rewards_to_go(experience.rewards, rollout.mask)
        params, opt_state, update_metrics = run_epochs(
            functools.partial(_loss, model, settings, state.frozen),
            _count,
            optimizer,
            state.params,
            state.opt_state,
            (experience, returns - state.baseline),
            key,
            accumulation_steps=settings.gradient_accumulation_steps,
        )
        mean, decay = metrics["objective/rlhf_reward"], settings.baseline_decay
        baseline = decay * state.baseline + (1 - decay) * mean
        metrics |= {**update_metrics, "objective/baseline": baseline}
        step = state.step + 1
        state = State(step, params, opt_state, state.frozen, baseline, score_stats)
        return state, metrics, experience.rollout

    return update_step


def _loss(model, settings, frozen, params, batch, key, count):
    (experience, advantages), _ = batch
    logprobs, _, _ = online.policy_logprobs(model, settings, params, frozen, experience)
    mask = experience.rollout.mask
    loss, _ = functional.reinforce_loss(logprobs, advantages, mask, denominator=count)
    return loss, {"loss/policy_avg": loss}


def _count(batch):
    (experience, _), _ = batch
    return jnp.sum(experience.rollout.mask, dtype=jnp.float32)
