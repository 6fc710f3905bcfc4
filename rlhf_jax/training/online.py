"""The part of an iteration that all online methods share: sample, score, experience.

A method adds a state, `init_state` and an `UpdateStep`, in which `make_experience` turns scores
into token rewards; `make_step` composes the full iteration. Two fields of the state are read here:

    state.params["model"]   the trained part of the policy
    state.frozen            {"ref": the trained part of the reference, "base": the frozen part that
                            policy and reference share, "reward": a reward model}, as far as they
                            exist

`split_policy` returns both for a new state.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.batches import PromptBatch, Rollout, ScoredRollout, Sequences
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.generation import generate
from rlhf_jax.rollout.score import end_scores, response_logits, response_logprobs
from rlhf_jax.rollout.settings import SamplingSettings
from rlhf_jax.rollout.shaping import (
    ScoreStats,
    check_stop_tokens,
    scale_scores,
    shape_scores,
    truncate_responses,
)
from rlhf_jax.training import trainable
from rlhf_jax.training.epochs import Metrics, map_microbatches
from rlhf_jax.training.settings import SampledSettings
from rlhf_jax.training.trainable import Trainable

# (state, batch, key) -> rollout
RolloutStep = Callable[[Any, PromptBatch, jax.Array], Rollout]
# (state, batch, rollout, scores f32[B] or f32[B, K], key) -> (state, metrics, rollout)
UpdateStep = Callable[
    [Any, PromptBatch, Rollout, jax.Array, jax.Array], tuple[Any, Metrics, ScoredRollout]
]
# (state, batch, key) -> (state, metrics, rollout)
Step = Callable[[Any, PromptBatch, jax.Array], tuple[Any, Metrics, ScoredRollout]]
# (sequences, hidden [B, T, D] of the policy, frozen states) -> values f32[B, T]
Values = Callable[[Sequences, jax.Array, jax.Array | None], jax.Array]


class Experience(NamedTuple):
    """Scored responses as a loss reads them; arrays [B, ...].

    Attributes:
      rollout: the responses, with log-probabilities, values and final scores.
      rewards: f32[B, T] or f32[B, K, T], the KL penalty of each token, with the score on the last
        one; 0 off the mask.
      states: [B, L, D], `trainable.frozen_states`; None where all layers are trained.
    """

    rollout: ScoredRollout
    rewards: jax.Array
    states: jax.Array | None


def sequences_of(rollout: ScoredRollout) -> Sequences:
    """The prompts and responses of a scored rollout."""
    return Sequences(rollout.prompts, rollout.prompt_mask, rollout.tokens, rollout.mask)


def policy_parts(params: Params, frozen: Params) -> Trainable:
    """The policy in `state.params` and `state.frozen`."""
    return Trainable(params["model"], frozen.get("base"))


def policy_params(model: Model, state: Any) -> Params:
    """The full parameters of the policy, which are sampled from and exported."""
    return trainable.full_params(model, policy_parts(state.params, state.frozen))


def reference_params(model: Model, state: Any) -> Params:
    """The full parameters of the reference."""
    return trainable.full_params(model, _reference_parts(state))


def split_policy(
    model: Model,
    params: Params,
    settings: SampledSettings,
    *,
    ref_params: Params | None = None,
    reward_params: Params | None = None,
) -> tuple[Params, dict[str, Params]]:
    """(trained part of the policy, `state.frozen`) of a new state.

    Args:
      params: full parameters of the policy.
      ref_params: those of the reference; by default a copy of `params`, or the base alone of fresh
        adapters. With `num_layers_unfrozen` or adapters the frozen parameters must be those of
        `params`. Without `settings.has_reference` none is held.
      reward_params: {"model": ..., "head": ...} of a JAX reward model for `make_step`.

    Raises:
      InputError: more layers are to be trained than there are, or the reference differs in frozen
        layers.
    """
    number, section = settings.num_layers_unfrozen, settings.section
    policy, base = trainable.split(model, params, number, section)
    ref, frozen = policy, {}
    if ref_params is not None:
        ref, ref_base = trainable.split(model, ref_params, number, section)
        _check_shared(base, ref_base, section)
    if settings.has_reference:
        # Copies, since a step that donates its state must not hold one buffer twice.
        own = ref_params is not None
        frozen["ref"] = jax.tree.map(jnp.copy, ref) if own else trainable.reference_part(model, ref)
    if base is not None:
        frozen["base"] = base
    if reward_params is not None:
        frozen["reward"] = reward_params
    return policy, frozen


def make_step(
    model: Model,
    settings: SampledSettings,
    update_step: UpdateStep,
    *,
    reward_model: Model | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Step:
    """A pure step (state, batch, key) -> (state, metrics, rollout): a full iteration.

    Args:
      reward_model: the language model under the reward head whose parameters are in
        `state.frozen["reward"]`; by default of the policy's architecture.
      stop_token_ids: tokens that end a response.

    Raises:
      InputError: the settings subtract the scores of reference responses, which a batch does not
        hold.
      ValueError: while tracing, if the state holds no reward model.
    """
    if settings.subtract_reference_score:
        raise InputError(
            f"{settings.section}.subtract_reference_score needs the reference responses, which a "
            "full step does not read; subtract their scores between make_rollout_step and "
            "make_update_step."
        )
    rollout_step = make_rollout_step(model, settings, stop_token_ids=stop_token_ids)
    reward_model = reward_model or model

    def step(state, batch, key):
        if "reward" not in state.frozen:
            raise ValueError(
                "the state holds no reward model: give reward_params to init_state, or score the "
                "responses yourself, between make_rollout_step and make_update_step."
            )
        sample_key, update_key = jax.random.split(key)
        rollout = rollout_step(state, batch, sample_key)
        score = functools.partial(end_scores, reward_model, state.frozen["reward"])
        sequences = Sequences(batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
        scores = map_microbatches(score, sequences, settings.num_score_parts)
        return update_step(state, batch, rollout, scores, update_key)

    return step


def make_rollout_step(
    model: Model, settings: SampledSettings, *, stop_token_ids: Sequence[int] = ()
) -> RolloutStep:
    """A pure (state, batch, key) -> Rollout: `settings.num_responses` sampled ones a prompt."""
    sample = functools.partial(
        sample_responses,
        model,
        stop_token_ids=stop_token_ids,
        num_responses=settings.num_responses,
    )

    def rollout_step(state, batch, key):
        return sample(policy_params(model, state), batch, key, settings)

    return rollout_step


def sample_responses(
    model: Model,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
    settings: SamplingSettings,
    *,
    stop_token_ids: Sequence[int] = (),
    num_responses: int | None = None,
) -> Rollout:
    """Responses with the limits and the truncation of the settings.

    `settings.truncate_token` has to be an id. Draws depend on the index in the batch, as in
    `generate`: each batch, and each part of one, needs a key of its own.
    """
    limit_key, key = jax.random.split(key)
    limits = None
    if settings.min_response_length is not None:
        shape, longest = batch.prompts.shape[:1], settings.response_length
        shape += () if num_responses is None else (num_responses,)
        limits = jax.random.randint(limit_key, shape, settings.min_response_length, longest + 1)
    rollout = generate(
        model,
        params,
        batch.prompts,
        batch.prompt_mask,
        key,
        max_new_tokens=settings.response_length,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_token_ids=tuple(stop_token_ids) if settings.stop_at_eos else (),
        max_lengths=limits,
        num_responses=num_responses,
    )
    return truncate_responses(settings, rollout)


def make_experience(
    model: Model,
    settings: SampledSettings,
    state: Any,
    batch: PromptBatch,
    rollout: Rollout,
    scores: jax.Array,
    *,
    kl_coef: jax.Array | float,
    stop_token_ids: Sequence[int] = (),
    score_stats: ScoreStats | None = None,
    values: Values | None = None,
) -> tuple[Experience, ScoreStats | None, Metrics]:
    """(experience, new score statistics, metrics `objective/...`) of scored responses.

    The policy's log-probabilities are computed anew rather than taken from sampling: values and
    loss read the same pass, and the first ratios are then 1 but for the rounding of another batch
    shape. The passes run `settings.score_batch_size` responses at a time.

    Args:
      scores: f32[B] or f32[B, K], of the reward models or functions.
      kl_coef: weight of the KL penalty in the rewards.
      score_stats: of the scores of earlier iterations, for `scale_reward`.
      values: None without a value model.

    Raises:
      ValueError: the batch has not `settings.batch_size` prompts.
    """
    check_stop_tokens(settings, stop_token_ids)
    check_batch(settings, rollout)
    scores = shape_scores(settings, stop_token_ids, rollout, scores)
    valid = rollout.mask.any(axis=-1)
    scores, score_stats, scaling = scale_scores(settings, score_stats, scores, valid)
    sequences = Sequences(batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
    states, entropy, exact_kl, per_token = score_passes(model, settings, state, sequences, values)
    logprobs, ref_logprobs, estimates = per_token
    scored = ScoredRollout(*sequences, logprobs, ref_logprobs, estimates, scores)
    reward = functools.partial(
        functional.token_rewards, kl_coef=kl_coef, kl_kind=settings.kl_estimator
    )
    if scores.ndim == 2:
        reward = jax.vmap(reward, 1, 1)
    rewards, _ = reward(scores, logprobs, ref_logprobs, rollout.mask)
    metrics = _objective_metrics(kl_coef, scored, rewards, entropy, exact_kl)
    return Experience(scored, rewards, states), score_stats, metrics | scaling


def check_batch(settings: SampledSettings, rollout: Rollout) -> None:
    """Raises a ValueError while tracing unless there are `settings.batch_size` prompts."""
    if rollout.tokens.shape[0] != settings.batch_size:
        raise ValueError(
            f"the batch has {rollout.tokens.shape[0]} prompts, but {settings.section}.batch_size "
            f"is {settings.batch_size}."
        )


def score_passes(
    model: Model,
    settings: SampledSettings,
    state: Any,
    sequences: Sequences,
    values: Values | None = None,
    *,
    with_policy: bool = True,
) -> tuple[Any, Any, Any, tuple[Any, Any, Any]]:
    """(frozen states, entropy, exact KL, (logprobs, reference logprobs, values)) of responses.

    The passes before the updates, `settings.score_batch_size` prompts at a time. The last three are
    0 off the mask; what is not computed is None.

    Args:
      values: None without a value model.
      with_policy: whether the policy is run; without it only the reference and the frozen layers.
    """
    passes = functools.partial(_score_passes, model, settings, state, values, with_policy)
    *shared, per_token = map_microbatches(passes, sequences, settings.num_score_parts)
    per_token = jax.tree.map(lambda x: jnp.where(sequences.mask, x, 0.0), per_token)
    return *shared, per_token


def policy_logprobs(
    model: Model, settings: SamplingSettings, params: Params, frozen: Params, experience: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprobs f32[..., T], entropy f32[..., T], hidden [..., T, D]) of the policy, for a loss.

    "..." is B, or B, K.

    Args:
      params, frozen: `state.params`, by which a loss is differentiated, and `state.frozen`.
      experience: a tuple with the fields `rollout` and `states` of `Experience`.
    """
    upper, lower = trainable.stacks(policy_parts(params, frozen))
    shared = {"temperature": settings.temperature, "frozen": lower, "states": experience.states}
    return response_logprobs(model, upper, sequences_of(experience.rollout), **shared)


def _objective_metrics(kl_coef, scored, rewards, entropy, exact_kl):
    """Means over responses of scores and of sums over tokens; padding of the batch is left out."""
    mask, scores = scored.mask, scored.scores
    valid = mask.any(axis=-1)

    def mean(x):
        x = x if x.ndim == valid.ndim else jnp.sum(x, axis=-1)
        return functional.masked_mean(x, valid)

    # token_rewards puts the score on the last real token; the rest is the penalty.
    score_mean, total = mean(scores), mean(rewards)
    metrics = {
        "objective/scores": score_mean,
        "objective/scores_std": jnp.sqrt(functional.masked_var(scores, valid, unbiased=False)),
        "objective/kl": mean(scored.logprobs - scored.ref_logprobs),
        "objective/rlhf_reward": total,
        "objective/non_score_reward": total - score_mean,
        "objective/entropy": mean(-scored.logprobs),
        "objective/kl_coef": jnp.asarray(kl_coef, jnp.float32),
        "objective/response_length": mean(mask.astype(jnp.float32)),
        "policy/entropy_avg": functional.masked_mean(entropy, mask),
        "perf/tokens": jnp.sum(mask, dtype=jnp.float32)
        + jnp.sum(scored.prompt_mask, dtype=jnp.float32),
    }
    if exact_kl is not None:
        metrics["objective/kl_exact"] = mean(jnp.where(mask, exact_kl, 0.0))
    return metrics


def _reference_parts(state):
    return Trainable(state.frozen["ref"], state.frozen.get("base"))


def _score_passes(model, settings, state, values, with_policy, sequences):
    policy = policy_parts(state.params, state.frozen)
    states = trainable.frozen_states(model, policy, sequences)
    upper, lower = trainable.stacks(policy)
    shared = {"temperature": settings.temperature, "frozen": lower}
    logprobs, entropy, hidden = None, None, None
    if with_policy:
        logprobs, entropy, hidden = response_logprobs(
            model, upper, sequences, states=states, **shared
        )
    ref_logprobs, ref_hidden = None, None
    if settings.has_reference:
        ref_upper, _ = trainable.stacks(_reference_parts(state))
        ref_logprobs, _, ref_hidden = response_logprobs(
            model, ref_upper, sequences, states=states, **shared
        )
    exact_kl = None
    if settings.exact_kl:
        assert hidden is not None  # settings see to it
        assert ref_hidden is not None
        # The compiler merges these logits with those above.
        logits = response_logits(model, upper, hidden, **shared)
        ref_logits = response_logits(model, ref_upper, ref_hidden, **shared)
        exact_kl = functional.token_kl(logits, ref_logits)
    estimates = None if values is None else values(sequences, hidden, states)
    return states, entropy, exact_kl, (logprobs, ref_logprobs, estimates)


def _check_shared(base: Params | None, ref_base: Params | None, section: str) -> None:
    """Raises an InputError if the frozen part of the reference differs from the policy's."""
    pairs = list(zip(jax.tree.leaves(base), jax.tree.leaves(ref_base), strict=True))
    if any(isinstance(leaf, jax.core.Tracer) for pair in pairs for leaf in pair):
        raise InputError(
            f"ref_params with {section}.num_layers_unfrozen or adapters are compared with params; "
            "call init_state outside of jit."
        )
    if not all(bool(jnp.array_equal(ours, theirs)) for ours, theirs in pairs):
        raise InputError(
            f"ref_params differ from params in layers or embeddings that {section}."
            "num_layers_unfrozen, or adapters, freeze and the two share; give a reference with the "
            f"same ones, or set {section}.num_layers_unfrozen to null and train no adapters."
        )
