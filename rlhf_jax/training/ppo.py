"""PPO on responses, with a per-token KL penalty towards a reference (Ziegler et al. 2019).

One iteration: sample responses, score them, turn scores and KL into token rewards, estimate
advantages, and take some epochs of clipped updates. With a reward model in JAX all of it is one
pure function, `make_step`; with any other reward the two halves around it are compiled apart,
`make_rollout_step` and `make_update_step`, and only tokens and scores leave the device.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import PromptBatch, Rollout, ScoredRollout
from rlhf_jax.errors import InputError
from rlhf_jax.models.heads import apply_head, init_value_head
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.score import end_scores, response_hidden
from rlhf_jax.training.ppo_scores import shape_scores
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
      params: {"model": the policy, "value_head": the value head on its trunk}, float32.
      opt_state: of the optimizer.
      kl_coef: f32[], the weight of the KL penalty.
      frozen: {"ref": the reference policy}, with a JAX reward model also {"reward": its
        parameters}. No step changes it.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    kl_coef: jax.Array
    frozen: Params


def init_state(
    model: Model,
    params: Params,
    settings: Settings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
    ref_params: Params | None = None,
    reward_params: Params | None = None,
) -> PPOState:
    """The state before the first iteration.

    Args:
      params: the policy's parameters to start from.
      key: there for symmetry; the value head starts at zero and nothing is random.
      ref_params: the reference's parameters; by default a copy of `params`.
      reward_params: {"model": ..., "head": ...} of the reward model that `make_step` is to use.

    The state holds `params` and `reward_params` themselves: a step that donates it consumes them.
    """
    del key
    optimizer = optimizer or make_optimizer(OPTIMIZER)
    # A copy, since a step that donates its state must not hold one buffer twice.
    frozen = {"ref": jax.tree.map(jnp.copy, params if ref_params is None else ref_params)}
    if reward_params is not None:
        frozen["reward"] = reward_params
    trained = {"model": params, "value_head": init_value_head(model.config.n_embd)}
    kl_coef = jnp.asarray(settings.kl_coef, jnp.float32)
    step = jnp.zeros((), jnp.int32)
    return PPOState(step, trained, optimizer.init(trained), kl_coef, frozen)


def make_step(
    model: Model,
    settings: Settings,
    *,
    reward_model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Callable[[PPOState, PromptBatch, jax.Array], tuple[PPOState, Metrics, ScoredRollout]]:
    """A pure step (state, batch, key) -> (state, metrics, rollout): a whole PPO iteration.

    Args:
      model: the policy; the reference has the same form.
      reward_model: the trunk of the reward model whose parameters are in
        `state.frozen["reward"]`; by default of the policy's form.
      stop_token_ids: tokens that end a response.

    Returns:
      The step. Scores in its rollout are final: with penalty and clipping. It raises a ValueError
      while tracing if the state holds no reward model.

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
    rollout_step = make_rollout_step(model, settings, stop_token_ids=stop_token_ids)
    update_step = make_update_step(
        model, settings, optimizer=optimizer, stop_token_ids=stop_token_ids
    )
    reward_model = reward_model or model

    def step(state, batch, key):
        if "reward" not in state.frozen:
            raise ValueError(
                "the state holds no reward model: give reward_params to init_state, or score the "
                "responses yourself, between make_rollout_step and make_update_step."
            )
        sample_key, update_key = jax.random.split(key)
        rollout = rollout_step(state, batch, sample_key)
        scores = response_scores(reward_model, state.frozen["reward"], batch, rollout)
        return update_step(state, batch, rollout, scores, update_key)

    return step


def make_rollout_step(
    model: Model, settings: Settings, *, stop_token_ids: Sequence[int] = ()
) -> Callable[[PPOState, PromptBatch, jax.Array], Rollout]:
    """A pure (state, batch, key) -> Rollout: one sampled response to each prompt."""

    def rollout_step(state, batch, key):
        return sample_responses(
            model, state.params["model"], batch, key, settings, stop_token_ids=stop_token_ids
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
    """Responses as PPO samples them: no top-k or top-p, and limits drawn where asked for."""
    limit_key, key = jax.random.split(key)
    limits = None
    if settings.min_response_length is not None:
        rows, longest = batch.prompts.shape[:1], settings.response_length
        limits = jax.random.randint(limit_key, rows, settings.min_response_length, longest + 1)
    return generate(
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


def response_scores(
    reward_model: Model, reward_params: Params, batch: PromptBatch, rollout: Rollout
) -> jax.Array:
    """f32[B]: what the reward model gives at the last real token of each response."""
    scores = end_scores(
        reward_model,
        reward_params,
        batch.prompts,
        batch.prompt_mask,
        rollout.tokens[:, None],
        rollout.mask[:, None],
    )
    return scores[:, 0]


def response_logprobs(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprobs f32[B, T], entropy f32[B, T], hidden [B, T, D]) of the response tokens, in nats."""
    hidden = response_hidden(model, params, prompts, prompt_mask, tokens, mask)
    logits = model.logits(params, hidden) / temperature
    return (
        functional.token_logprobs(logits, tokens),
        functional.token_entropy(logits),
        hidden,
    )


def make_update_step(
    model: Model,
    settings: Settings,
    *,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Callable[
    [PPOState, PromptBatch, Rollout, jax.Array, jax.Array],
    tuple[PPOState, Metrics, ScoredRollout],
]:
    """A pure (state, batch, rollout, scores f32[B], key) -> (state, metrics, rollout)."""
    optimizer = optimizer or make_optimizer(OPTIMIZER)
    stops = tuple(stop_token_ids)
    if settings.missing_eos_penalty is not None and not (stops and settings.stop_at_eos):
        raise InputError(
            "ppo.missing_eos_penalty needs responses that can end: set ppo.stop_at_eos and give "
            "stop_token_ids, or leave the penalty out."
        )

    def update_step(state, batch, rollout, scores, key):
        scores = shape_scores(settings, stops, rollout, scores)
        scored, entropy = _score_rollout(model, settings, state, batch, rollout, scores)
        rewards, kl = functional.token_rewards(
            scores,
            scored.logprobs,
            scored.ref_logprobs,
            scored.mask,
            kl_coef=state.kl_coef,
            kl_kind=settings.kl_estimator,
        )
        metrics = _objective_metrics(settings, state, scored, rewards, kl, entropy)
        experience = make_experience(settings, scored, rewards)
        params, opt_state, update_metrics = run_epochs(
            model, settings, optimizer, state.params, state.opt_state, experience, key
        )
        kl_coef = state.kl_coef
        if settings.adaptive_kl:
            kl_coef = functional.adaptive_kl_update(
                kl_coef,
                metrics["objective/kl"],
                jnp.sum(scored.mask.any(axis=1), dtype=jnp.float32),
                target=settings.target,
                horizon=settings.horizon,
            )
        new_state = PPOState(state.step + 1, params, opt_state, kl_coef, state.frozen)
        return new_state, {**metrics, **update_metrics}, scored

    return update_step


def _score_rollout(model, settings, state, batch, rollout, scores):
    """(ScoredRollout, entropy f32[B, T]): policy, value and reference on the sampled tokens.

    The policy's log-probs are computed anew rather than taken from sampling: the pass is needed for
    the values, and the first ratios are then 1 but for the rounding of another batch shape.
    """
    parts = (batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
    logprobs, entropy, hidden = response_logprobs(
        model, state.params["model"], *parts, temperature=settings.temperature
    )
    ref_logprobs, _, _ = response_logprobs(
        model, state.frozen["ref"], *parts, temperature=settings.temperature
    )
    values = apply_head(state.params["value_head"], hidden)
    logprobs, ref_logprobs, values = (
        jnp.where(rollout.mask, x, 0.0) for x in (logprobs, ref_logprobs, values)
    )
    return ScoredRollout(*parts, logprobs, ref_logprobs, values, scores), entropy


def _objective_metrics(settings, state, scored, rewards, kl, entropy):
    """What the iteration sampled: means over responses of scores and of sums over tokens.

    Rows without a token only fill up a short last batch, and count nowhere.
    """
    mask, scores = scored.mask, scored.scores
    rows = mask.any(axis=1)
    score_mean = functional.masked_mean(scores, rows)
    # token_rewards puts the score on the last real token; what remains is the penalty.
    total = functional.masked_mean(jnp.sum(rewards, axis=1), rows)
    differences = jnp.sum(scored.logprobs - scored.ref_logprobs, axis=1)
    tokens = jnp.sum(mask, dtype=jnp.float32)
    return {
        "objective/scores": score_mean,
        "objective/scores_std": jnp.sqrt(functional.masked_var(scores, rows, unbiased=False)),
        "objective/kl": functional.masked_mean(differences, rows),
        "objective/rlhf_reward": total,
        "objective/non_score_reward": total - score_mean,
        "objective/entropy": functional.masked_mean(jnp.sum(-scored.logprobs, axis=1), rows),
        "objective/kl_coef": state.kl_coef,
        "objective/response_length": functional.masked_mean(
            jnp.sum(mask, axis=1, dtype=jnp.float32), rows
        ),
        "policy/entropy_avg": functional.masked_mean(entropy, mask),
        "perf/tokens": tokens + jnp.sum(scored.prompt_mask, dtype=jnp.float32),
    }
