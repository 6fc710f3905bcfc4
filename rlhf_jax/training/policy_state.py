"""The state of online trainers whose policy alone is trained: GRPO, RLOO and online DPO."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.shaping import ScoreStats, init_score_stats
from rlhf_jax.training import online
from rlhf_jax.training.settings import OptimizerSettings, SampledSettings
from rlhf_jax.training.state import make_optimizer


class PolicyState(NamedTuple):
    """Everything that an exact continuation needs.

    Attributes:
      step: i32[], iterations done.
      params: {"model": the trained part of the policy}, float32.
      opt_state: of the optimizer.
      frozen: the reference, with `settings.has_reference`, and all other frozen parameters, as in
        `training.online`.
      score_stats: statistics of all scores until now; None without `scale_reward`.
      prompt_batches: i32[], batches of prompts drawn; None where it is one in each iteration.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    frozen: Params
    score_stats: ScoreStats | None = None
    prompt_batches: jax.Array | None = None


def init_state(
    model: Model,
    params: Params,
    settings: SampledSettings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
    ref_params: Params | None = None,
    reward_params: Params | None = None,
) -> PolicyState:
    """The state before the first iteration.

    The state holds `params` and `reward_params` themselves: a step that donates it consumes them.

    Args:
      params, ref_params, reward_params: as in `online.split_policy`.
      key: unused, as nothing is random; every trainer has it.
      optimizer: that of the step; by default Adam, as the trainers' records have it.

    Raises:
      InputError: as `online.split_policy` does.
    """
    del key
    optimizer = optimizer or make_optimizer(OptimizerSettings())
    policy, frozen = online.split_policy(
        model, params, settings, ref_params=ref_params, reward_params=reward_params
    )
    trained, step = {"model": policy}, jnp.zeros((), jnp.int32)
    stats = init_score_stats(settings)
    drawn = jnp.zeros((), jnp.int32) if settings.max_sampling_rounds > 1 else None
    return PolicyState(step, trained, optimizer.init(trained), frozen, stats, drawn)
