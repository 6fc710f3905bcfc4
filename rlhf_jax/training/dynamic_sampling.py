"""Dynamic sampling: groups whose scores are all equal are set aside, and more prompts are drawn.

An iteration draws batches of prompts until it has `settings.batch_size` groups with spread, at most
`settings.max_sampling_rounds` batches. If there are fewer, the first groups without spread fill the
batch; of more, the last ones are left out. The state counts the batches drawn in the run, which is
the position in the data.

Yu et al., DAPO, section 3.2 (arXiv:2503.14476).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.batches import PromptBatch, Rollout, ScoredRollout
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel.constraints import constrain_batch
from rlhf_jax.training import online
from rlhf_jax.training.grpo_loss import final_scores
from rlhf_jax.training.settings import SampledSettings


class Groups(NamedTuple):
    """Prompts with their responses and scores, arrays [B, ...].

    Attributes:
      batch: the prompts.
      rollout: arrays [B, K, T].
      scores: f32[B, K], or f32[B, K, R] of R rewards that are normalized apart; as given.
    """

    batch: PromptBatch
    rollout: Rollout
    scores: jax.Array


class Drawn(NamedTuple):
    """The groups of an iteration until now.

    Attributes:
      groups: B of them, those with spread first.
      num_spread: i32[], how many of these have spread.
      rounds: i32[], batches drawn.
      num_even: i32[], groups without spread in them.
      rewards: f32[], the sum over rounds of the mean score of a response.
    """

    groups: Groups
    num_spread: jax.Array
    rounds: jax.Array
    num_even: jax.Array
    rewards: jax.Array


def nothing_drawn(groups: Any) -> Drawn:
    """Before the first round; of the groups, shapes are enough."""
    empty = jax.tree.map(jnp.zeros_like, groups)
    zero = jnp.zeros((), jnp.int32)
    return Drawn(empty, zero, zero, zero, jnp.zeros((), jnp.float32))


def with_groups(
    settings: SampledSettings, stop_token_ids: Sequence[int], drawn: Drawn, groups: Groups
) -> Drawn:
    """After one more round, with its groups."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), drawn.groups, groups)
    spread = _has_spread(settings, stop_token_ids, both)
    # Those that stand for no group, before the first round, come last.
    is_real = both.rollout.mask.any(axis=(1, 2))
    place = jnp.where(spread, 0, jnp.where(is_real, 1, 2))
    chosen = jnp.argsort(place, stable=True)[: settings.batch_size]
    added = slice(settings.batch_size, None)
    scores = groups.scores if groups.scores.ndim == 2 else jnp.nansum(groups.scores, axis=-1)
    valid = groups.rollout.mask.any(axis=-1)
    return Drawn(
        jax.tree.map(lambda x: constrain_batch(x[chosen]), both),
        jnp.sum(spread[chosen], dtype=jnp.int32),
        drawn.rounds + 1,
        drawn.num_even + jnp.sum(~spread[added], dtype=jnp.int32),
        drawn.rewards + functional.masked_mean(scores.astype(jnp.float32), valid),
    )


def is_unfinished(settings: SampledSettings, drawn: Drawn) -> jax.Array:
    """bool[]: whether another round is needed and allowed."""
    is_short = drawn.num_spread < settings.batch_size
    return is_short & (drawn.rounds < settings.max_sampling_rounds)


def draw_metrics(settings: SampledSettings, drawn: Drawn) -> online.Metrics:
    """f32[] each.

    dynamic_sampling/rounds      batches drawn
    dynamic_sampling/set_aside   share of groups without spread in them
    dynamic_sampling/reward      mean score of all their responses
    """
    rounds = drawn.rounds.astype(jnp.float32)
    return {
        "dynamic_sampling/rounds": rounds,
        "dynamic_sampling/set_aside": drawn.num_even / (rounds * settings.batch_size),
        "dynamic_sampling/reward": drawn.rewards / rounds,
    }


def make_step(
    model: Model,
    settings: SampledSettings,
    update_step: online.UpdateStep,
    *,
    reward_model: Model | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Callable[..., Any]:
    """`online.make_step`; with several `max_sampling_rounds` a step that draws groups.

    That one is (state, batches, key) -> (state, metrics, (rollout, indices)): `batches` is a tuple
    of one PromptBatch for each round, all of one shape, from number `state.prompt_batches` on, and
    the indices are those of the prompts in the rollout.
    """
    options: dict[str, Any] = {"reward_model": reward_model, "stop_token_ids": stop_token_ids}
    if settings.max_sampling_rounds == 1:
        return online.make_step(model, settings, update_step, **options)
    sample_and_score: Any = online.make_step(model, settings, _groups, **options)

    def step(state, batches, key):
        draw_key, update_key = jax.random.split(key)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)

        def draw(drawn):
            batch = jax.tree.map(lambda x: x[drawn.rounds], stacked)
            key = jax.random.fold_in(draw_key, drawn.rounds)
            groups = sample_and_score(state, batch, key)
            return with_groups(settings, stop_token_ids, drawn, groups)

        shapes = jax.eval_shape(sample_and_score, state, batches[0], draw_key)
        drawn = jax.lax.while_loop(
            lambda drawn: is_unfinished(settings, drawn), draw, nothing_drawn(shapes)
        )
        return update_drawn(settings, update_step, state, drawn, update_key)

    return step


def update_drawn(
    settings: SampledSettings, update_step: online.UpdateStep, state: Any, drawn: Drawn, key: Any
) -> tuple[Any, online.Metrics, tuple[ScoredRollout, jax.Array]]:
    """(state, metrics, (rollout, indices)) after the update on the groups drawn."""
    batch = drawn.groups.batch
    state, metrics, rollout = update_step(state, *drawn.groups, key)
    state = state._replace(prompt_batches=state.prompt_batches + drawn.rounds)
    return state, metrics | draw_metrics(settings, drawn), (rollout, batch.indices)


def _groups(state, batch, rollout, scores, key):
    """The update step that only returns what was sampled and scored."""
    del state, key
    return Groups(batch, rollout, scores)


def _has_spread(settings, stop_token_ids, groups):
    """bool[...]: whether the final scores of a group differ, or one of its rewards."""
    scores, valid = groups.scores, groups.rollout.mask.any(axis=-1)
    if scores.ndim == 3:
        return jnp.any(_range(scores, jnp.isfinite(scores) & valid[..., None]) > 0, axis=-1)
    return _range(final_scores(settings, stop_token_ids, groups.rollout, scores), valid) > 0


def _range(scores, mask):
    """The largest minus the smallest of the scores of each group; below 0 without any."""
    highest = jnp.max(scores, axis=1, where=mask, initial=-jnp.inf)
    return highest - jnp.min(scores, axis=1, where=mask, initial=jnp.inf)
