"""PPO on responses, with a per-token KL penalty towards a reference (Ziegler et al. 2019).

One iteration: sample responses, score them, turn scores and KL into token rewards, estimate
advantages, and take some epochs of clipped updates. With a reward model in JAX all of it is one
pure function, `make_step`; with any other reward the two halves around it are compiled apart,
`make_rollout_step` and `make_update_step`, and only tokens and scores leave the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import PromptBatch, Rollout, ScoredRollout
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.generation import generate
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.training.accumulate import map_microbatches
from rlhf_jax.training.frozen import split_params
from rlhf_jax.training.ppo_metrics import objective_metrics
from rlhf_jax.training.ppo_passes import (
    init_value,
    policy_params,
    reference_params,
    response_logprobs,
    score_rollout,
    value_form,
)
from rlhf_jax.training.ppo_scores import (
    ScoreStats,
    check_stop_tokens,
    init_score_stats,
    scale_scores,
    shape_scores,
    truncate_responses,
)
from rlhf_jax.training.ppo_settings import Settings
from rlhf_jax.training.ppo_update import make_experience, run_epochs
from rlhf_jax.training.state import OptimizerSettings, make_optimizer

__all__ = [
    "OPTIMIZER",
    "PPOState",
    "Settings",
    "init_state",
    "make_rollout_step",
    "make_step",
    "make_update_step",
    "policy_params",
    "reference_params",
    "response_logprobs",
    "response_scores",
    "sample_responses",
]

Metrics = dict[str, jax.Array]

# Adam's epsilon is that of openai/lm-human-preferences.
OPTIMIZER = OptimizerSettings(learning_rate=1e-5, eps=1e-5)


class PPOState(NamedTuple):
    """All that an exact continuation needs.

    Attributes:
      step: i32[], iterations done.
      params: what is trained, float32: {"model": the policy, "value_head": the head on it}, or with
        a value model of its own {"model": ..., "value_model": {"model": ..., "head": ...}}.
      opt_state: of the optimizer.
      kl_coef: f32[], the weight of the KL penalty.
      frozen: {"ref": the reference policy}, with a JAX reward model also {"reward": its
        parameters}. With `num_layers_unfrozen` also {"trunk": embeddings and lower layers}, and
        then policy and reference are upper halves; `policy_params` and `reference_params` give
        them whole. No step changes it.
      score_stats: of the scores until now; None without `scale_reward`.
      penalty_coef: f32[], of the surrogate "kl_penalty"; None with another one.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    kl_coef: jax.Array
    frozen: Params
    score_stats: ScoreStats | None = None
    penalty_coef: jax.Array | None = None


def init_state(
    model: Model,
    params: Params,
    settings: Settings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
    ref_params: Params | None = None,
    reward_params: Params | None = None,
    value_params: Params | None = None,
) -> PPOState:
    """The state before the first iteration.

    Args:
      params: the policy's parameters to start from, whole.
      key: there for symmetry; nothing is random.
      ref_params: the reference's parameters, whole; by default a copy of `params`. With
        `num_layers_unfrozen` their frozen half has to be that of `params`.
      reward_params: {"model": ..., "head": ...} of the reward model that `make_step` is to use.
      value_params: likewise, what a value model "reward" starts from; by default `reward_params`.

    The state holds `params` and `reward_params` themselves: a step that donates it consumes them.

    Raises:
      InputError: the settings ask for more unfrozen layers than there are, for a reference that
        shares frozen layers with the policy and differs in them, or for a value model that starts
        from a reward model where none is given.
    """
    del key
    optimizer = optimizer or make_optimizer(OPTIMIZER)
    trunk, policy = split_params(model, params, settings.num_layers_unfrozen, "ppo")
    ref = policy
    if ref_params is not None:
        ref_trunk, ref = split_params(model, ref_params, settings.num_layers_unfrozen, "ppo")
        _check_shared(trunk, ref_trunk)
    # A copy, since a step that donates its state must not hold one buffer twice.
    frozen = {"ref": jax.tree.map(jnp.copy, ref)}
    if trunk is not None:
        frozen["trunk"] = trunk
    if reward_params is not None:
        frozen["reward"] = reward_params
    start = reward_params if value_params is None else value_params
    trained = {"model": policy, **init_value(settings, model, policy, start)}
    has_penalty = settings.surrogate == "kl_penalty"
    return PPOState(
        jnp.zeros((), jnp.int32),
        trained,
        optimizer.init(trained),
        jnp.asarray(settings.kl_coef, jnp.float32),
        frozen,
        score_stats=None if settings.scale_reward is None else init_score_stats(),
        penalty_coef=jnp.asarray(settings.penalty_coef, jnp.float32) if has_penalty else None,
    )


def _check_shared(trunk: Params | None, ref_trunk: Params | None) -> None:
    """Raises an InputError if the frozen half of the reference is another than the policy's."""
    pairs = list(zip(jax.tree.leaves(trunk), jax.tree.leaves(ref_trunk), strict=True))
    if any(isinstance(leaf, jax.core.Tracer) for pair in pairs for leaf in pair):
        raise InputError(
            "ref_params with ppo.num_layers_unfrozen are compared with params; call init_state "
            "outside of jit."
        )
    if not all(bool(jnp.array_equal(ours, theirs)) for ours, theirs in pairs):
        raise InputError(
            "ref_params differ from params in layers or embeddings that ppo.num_layers_unfrozen "
            "freezes and the two share; give a reference with the same ones, or set "
            "ppo.num_layers_unfrozen to null."
        )


def make_step(
    model: Model,
    settings: Settings,
    *,
    reward_model: Model | None = None,
    value_model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Callable[[PPOState, PromptBatch, jax.Array], tuple[PPOState, Metrics, ScoredRollout]]:
    """A pure step (state, batch, key) -> (state, metrics, rollout): a whole PPO iteration.

    Args:
      model: the policy; the reference has the same form.
      reward_model: the trunk of the reward model whose parameters are in
        `state.frozen["reward"]`; by default of the policy's form.
      value_model: the form of a value model that starts as a reward model; by default that of
        `reward_model`.
      stop_token_ids: tokens that end a response.

    Returns:
      The step. Scores in its rollout are final: penalised, clipped and scaled. It raises a
      ValueError while tracing if the state holds no reward model, or the batch no texts while
      `ptx_coef` is above 0.

    >>> from rlhf_jax.models.gpt2 import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    >>> key, params = jax.random.key(0), model.init(jax.random.key(1))
    >>> settings = Settings(batch_size=2, num_mini_batches=1, response_length=3)
    >>> scorer = {"model": jax.tree.map(jnp.copy, params), "head": {"kernel": jnp.ones(8)}}
    >>> state = init_state(model, params, settings, key, reward_params=scorer)
    >>> step = jax.jit(make_step(model, settings, stop_token_ids=(9,)), donate_argnums=0)
    >>> batch = PromptBatch(jnp.ones((2, 4), int), jnp.ones((2, 4), bool), jnp.arange(2))
    >>> state, metrics, rollout = step(state, batch, key)
    >>> int(state.step), rollout.tokens.shape
    (1, (2, 3))
    """
    if settings.subtract_reference_score:
        raise InputError(
            "ppo.subtract_reference_score needs the reference responses, which a whole step does "
            "not see; subtract their scores between make_rollout_step and make_update_step."
        )
    rollout_step = make_rollout_step(model, settings, stop_token_ids=stop_token_ids)
    reward_model = reward_model or model
    update_step = make_update_step(
        model,
        settings,
        value_model=value_model or reward_model,
        optimizer=optimizer,
        stop_token_ids=stop_token_ids,
    )

    def step(state, batch, key):
        if "reward" not in state.frozen:
            raise ValueError(
                "the state holds no reward model: give reward_params to init_state, or score the "
                "responses yourself, between make_rollout_step and make_update_step."
            )
        sample_key, update_key = jax.random.split(key)
        rollout = rollout_step(state, batch, sample_key)
        score = functools.partial(_end_scores, reward_model, state.frozen["reward"])
        rows = (batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
        scores = map_microbatches(score, rows, settings.num_score_parts)
        return update_step(state, batch, rollout, scores, update_key)

    return step


def make_rollout_step(
    model: Model, settings: Settings, *, stop_token_ids: Sequence[int] = ()
) -> Callable[[PPOState, PromptBatch, jax.Array], Rollout]:
    """A pure (state, batch, key) -> Rollout: one sampled response to each prompt."""

    def rollout_step(state, batch, key):
        return sample_responses(
            model, policy_params(model, state), batch, key, settings, stop_token_ids=stop_token_ids
        )

    return rollout_step


def sample_responses(
    model: Model,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
    settings: Settings,
    *,
    stop_token_ids: Sequence[int] = (),
) -> Rollout:
    """Responses as PPO samples them: no top-k or top-p, limits drawn and ends cut where asked for.

    `settings.truncate_token` has to be an id.
    """
    limit_key, key = jax.random.split(key)
    limits = None
    if settings.min_response_length is not None:
        rows, longest = batch.prompts.shape[:1], settings.response_length
        limits = jax.random.randint(limit_key, rows, settings.min_response_length, longest + 1)
    rollout = generate(
        model,
        params,
        batch.prompts,
        batch.prompt_mask,
        key,
        max_new_tokens=settings.response_length,
        temperature=settings.temperature,
        stop_token_ids=tuple(stop_token_ids) if settings.stop_at_eos else (),
        max_lengths=limits,
    )
    return truncate_responses(settings, rollout)


def response_scores(
    reward_model: Model, reward_params: Params, batch: PromptBatch, rollout: Rollout
) -> jax.Array:
    """f32[B]: what the reward model gives at the last real token of each response."""
    rows = (batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
    return _end_scores(reward_model, reward_params, rows)


def _end_scores(model, params, rows):
    """The same of the four arrays."""
    prompts, prompt_mask, tokens, mask = rows
    return end_scores(model, params, prompts, prompt_mask, tokens[:, None], mask[:, None])[:, 0]


def make_update_step(
    model: Model,
    settings: Settings,
    *,
    value_model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Callable[
    [PPOState, PromptBatch, Rollout, jax.Array, jax.Array],
    tuple[PPOState, Metrics, ScoredRollout],
]:
    """A pure (state, batch, rollout, scores f32[B], key) -> (state, metrics, rollout).

    Args:
      value_model: the form of a value model that starts as a reward model; by default the policy's.
    """
    optimizer = optimizer or make_optimizer(OPTIMIZER)
    values = value_form(settings, model, value_model)
    stops = tuple(stop_token_ids)
    check_stop_tokens(settings, stops)

    def update_step(state, batch, rollout, scores, key):
        scores = shape_scores(settings, stops, rollout, scores)
        rows = rollout.mask.any(axis=1)
        scores, score_stats, scaling = scale_scores(settings, state.score_stats, scores, rows)
        scored, lower, entropy, exact_kl = score_rollout(
            model, values, settings, state, batch, rollout, scores
        )
        rewards, _ = functional.token_rewards(
            scores,
            scored.logprobs,
            scored.ref_logprobs,
            scored.mask,
            kl_coef=state.kl_coef,
            kl_kind=settings.kl_estimator,
        )
        metrics = objective_metrics(state.kl_coef, scored, rewards, entropy, exact_kl) | scaling
        experience = make_experience(settings, scored, rewards)._replace(lower=lower)
        params, opt_state, update_metrics = run_epochs(
            model,
            settings,
            optimizer,
            state.params,
            state.opt_state,
            experience,
            key,
            penalty_coef=state.penalty_coef,
            texts=batch.texts,
            value_model=values,
            trunk=state.frozen.get("trunk"),
        )
        kl_coef = _adapt_kl_coef(settings, state.kl_coef, metrics["objective/kl"], rows)
        penalty_coef, penalty = _adapt_penalty(
            model,
            settings,
            params,
            scored,
            state.penalty_coef,
            trunk=state.frozen.get("trunk"),
            lower=lower,
        )
        new_state = PPOState(
            state.step + 1, params, opt_state, kl_coef, state.frozen, score_stats, penalty_coef
        )
        return new_state, {**metrics, **update_metrics, **penalty}, scored

    return update_step


def _adapt_kl_coef(settings, coef, kl, rows):
    """The weight of the KL penalty in the rewards of the next iteration."""
    if not settings.adaptive_kl:
        return coef
    num_samples = jnp.sum(rows, dtype=jnp.float32)
    return functional.adaptive_kl_update(
        coef, kl, num_samples, target=settings.target, horizon=settings.horizon
    )


def _adapt_penalty(model, settings, params, scored, coef, *, trunk=None, lower=None):
    """(the coefficient for the next iteration, metrics), by how far this one moved the policy."""
    if settings.surrogate != "kl_penalty":
        return coef, {}
    score = functools.partial(
        _logprobs, model, params["model"], temperature=settings.temperature, trunk=trunk
    )
    rows = (scored.prompts, scored.prompt_mask, scored.tokens, scored.mask)
    logprobs = map_microbatches(score, (rows, lower), settings.num_score_parts)
    # k3 of the old policy to the new one: its tokens, and the r - 1 - log r of the loss.
    kl = functional.masked_mean(
        functional.kl_estimate(scored.logprobs, logprobs, "k3"), scored.mask
    )
    adapted = functional.penalty_kl_update(coef, kl, target=settings.penalty_target)
    # Halved for long it would be 0, and stay so whatever the KL becomes.
    furthest = 2.0**20
    adapted = jnp.clip(adapted, settings.penalty_coef / furthest, settings.penalty_coef * furthest)
    return adapted, {"policy/penalty_kl": kl, "policy/penalty_coef": coef}


def _logprobs(model, params, rows_and_lower, *, temperature, trunk):
    """f32[B, T] of rows, above what the frozen layers made of them."""
    rows, lower = rows_and_lower
    return response_logprobs(
        model, params, *rows, temperature=temperature, trunk=trunk, lower=lower
    )[0]
