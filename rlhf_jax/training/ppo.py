"""PPO on responses, with a per-token KL penalty towards a reference (Ziegler et al. 2019).

With a reward model in JAX an iteration is one pure function, `make_step`: responses, scores, token
rewards, advantages, and some epochs of clipped updates. With any other reward the two halves around
it are compiled apart, `make_rollout_step` and `make_update_step`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import ScoredRollout
from rlhf_jax.functional.masking import batch_mean
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.shaping import ScoreStats, check_stop_tokens, init_score_stats
from rlhf_jax.training import online, sft
from rlhf_jax.training.epochs import map_microbatches, minibatch_indices, run_epochs
from rlhf_jax.training.online import make_rollout_step, policy_params, reference_params
from rlhf_jax.training.ppo_settings import TRAINER, Settings
from rlhf_jax.training.state import make_optimizer
from rlhf_jax.training.values import init_values, response_values, value_architecture

__all__ = [
    "PPOState",
    "Settings",
    "Targets",
    "init_state",
    "make_rollout_step",
    "make_step",
    "make_update_step",
    "policy_params",
    "reference_params",
]

# `split(key, n)` may fold in the numbers from 0 to n - 1: this one is not among them.
_TEXTS = 2**31 - 1


class PPOState(NamedTuple):
    """Everything that an exact continuation needs.

    Attributes:
      step: i32[], iterations done.
      params: the trained parameters, float32: {"model": the policy, "value_head": the head on it},
        or with a value model of its own {"model": ..., "value_model": {"model": ..., "head": ...}}.
      opt_state: of the optimizer.
      kl_coef: f32[], the weight of the KL penalty.
      frozen: the reference and all other frozen parameters, as in `training.online`.
        `policy_params` and `reference_params` return full ones.
      score_stats: statistics of all scores until now; None without `scale_reward`.
      penalty_coef: f32[], of the surrogate "kl_penalty"; None with "clip".
    """

    step: jax.Array
    params: Params
    opt_state: Any
    kl_coef: jax.Array
    frozen: Params
    score_stats: ScoreStats | None = None
    penalty_coef: jax.Array | None = None


class Targets(NamedTuple):
    """The experience of an iteration, arrays [B, ...], with the targets of the losses.

    Attributes:
      rollout, states: of `online.Experience`.
      advantages: f32[B, T], whitened, 0 off the mask.
      returns: f32[B, T], targets of the values, 0 off the mask.
    """

    rollout: ScoredRollout
    advantages: jax.Array
    returns: jax.Array
    states: jax.Array | None


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

    The state holds `params` and `reward_params` themselves: a step that donates it consumes them.

    Args:
      params, ref_params, reward_params: as in `online.split_policy`.
      key: unused, as nothing is random; every trainer has it.
      value_params: {"model": ..., "head": ...} of the reward model that a value model "reward"
        starts from; by default `reward_params`.

    Raises:
      InputError: as `online.split_policy` and `init_values` do.
    """
    del key
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)
    policy, frozen = online.split_policy(
        model, params, settings, ref_params=ref_params, reward_params=reward_params
    )
    start = reward_params if value_params is None else value_params
    trained = {"model": policy, **init_values(settings, model, policy, start)}
    has_penalty = settings.surrogate == "kl_penalty"
    return PPOState(
        jnp.zeros((), jnp.int32),
        trained,
        optimizer.init(trained),
        jnp.asarray(settings.kl_coef, jnp.float32),
        frozen,
        score_stats=init_score_stats(settings),
        penalty_coef=jnp.asarray(settings.penalty_coef, jnp.float32) if has_penalty else None,
    )


def make_step(
    model: Model,
    settings: Settings,
    *,
    reward_model: Model | None = None,
    value_model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> online.Step:
    """A pure step (state, batch, key) -> (state, metrics, rollout): a full PPO iteration.

    Args:
      reward_model: as in `online.make_step`.
      value_model: the architecture of a value model "reward"; by default that of `reward_model`.
      stop_token_ids: tokens that end a response.

    Scores in the rollout are final: penalised, clipped and scaled. The step raises a ValueError
    while tracing if the state holds no reward model, or the batch no texts with a `ptx_coef`.

    >>> from rlhf_jax.batches import PromptBatch
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
    reward_model = reward_model or model
    update_step = make_update_step(
        model,
        settings,
        value_model=value_model or reward_model,
        optimizer=optimizer,
        stop_token_ids=stop_token_ids,
    )
    return online.make_step(
        model, settings, update_step, reward_model=reward_model, stop_token_ids=stop_token_ids
    )


def make_update_step(
    model: Model,
    settings: Settings,
    *,
    value_model: Model | None = None,
    optimizer: optax.GradientTransformation | None = None,
    stop_token_ids: Sequence[int] = (),
) -> online.UpdateStep:
    """A pure (state, batch, rollout, scores f32[B], key) -> (state, metrics, rollout).

    Args:
      value_model: the architecture of a value model "reward"; by default the policy's.
    """
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)
    value_model = value_architecture(settings, model, value_model)
    check_stop_tokens(settings, stop_token_ids)

    def update_step(state, batch, rollout, scores, key):
        experience, score_stats, metrics = online.make_experience(
            model,
            settings,
            state,
            batch,
            rollout,
            scores,
            kl_coef=state.kl_coef,
            stop_token_ids=stop_token_ids,
            score_stats=state.score_stats,
            values=functools.partial(
                response_values, settings, value_model, state.params, state.frozen
            ),
        )
        targets = _make_targets(settings, experience)
        params, opt_state, update_metrics = run_epochs(
            functools.partial(_loss, model, value_model, settings, state),
            _count,
            optimizer,
            state.params,
            state.opt_state,
            targets,
            key,
            num_epochs=settings.num_ppo_epochs,
            num_minibatches=settings.num_mini_batches,
            accumulation_steps=settings.gradient_accumulation_steps,
            texts=_text_minibatches(settings, batch.texts, key),
            max_approxkl=settings.max_approxkl,
        )
        kl_coef = _adapt_kl_coef(settings, state.kl_coef, metrics["objective/kl"], rollout.mask)
        penalty_coef, penalty = _adapt_penalty(model, settings, state, params, experience)
        new_state = PPOState(
            state.step + 1, params, opt_state, kl_coef, state.frozen, score_stats, penalty_coef
        )
        scored = experience.rollout._replace(advantages=targets.advantages)
        return new_state, {**metrics, **update_metrics, **penalty}, scored

    return update_step


def _make_targets(settings, experience):
    """Targets with whitened advantages, and returns from the advantages before whitening."""
    scored, rewards, states = experience
    if settings.whiten_rewards:
        rewards = functional.masked_whiten(rewards, scored.mask, shift_mean=False)
    advantages, returns = functional.gae(
        rewards, scored.values, scored.mask, gamma=settings.gamma, lam=settings.lam
    )
    advantages = functional.masked_whiten(advantages, scored.mask)
    return Targets(scored, advantages, returns, states)


def _text_minibatches(settings, texts, key):
    """The texts of each update, arrays [epochs * minibatches, ...]; None where `ptx_coef` is 0."""
    if not settings.ptx_coef:
        return None
    if texts is None:
        raise ValueError(
            f"ppo.ptx_coef is {settings.ptx_coef}, but the batch has no texts: put a TextBatch "
            "into PromptBatch.texts, or set ppo.ptx_coef to 0."
        )
    actual, size = texts.tokens.shape[0], settings.num_texts
    if actual != size:
        raise ValueError(
            f"the batch has {actual} sequences of texts, but ppo.ptx_batch_size is {size}."
        )
    key = jax.random.fold_in(key, _TEXTS)
    order = minibatch_indices(key, settings.num_ppo_epochs, settings.num_mini_batches, size)
    return jax.tree.map(lambda x: x[order], texts)


def _count(batch):
    """(f32[] tokens of responses, f32[] tokens of texts) that the losses are means over."""
    minibatch, texts = batch
    tokens = jnp.sum(minibatch.rollout.mask, dtype=jnp.float32)
    return tokens, None if texts is None else sft.count_targets(texts)


def _loss(model, value_model, settings, state, params, batch, key, denominators):
    """Policy loss + vf_coef * value loss - entropy_coef * entropy + ptx_coef * texts; metrics."""
    del key
    (minibatch, texts), (count, text_count) = batch, denominators or (None, None)
    rollout, sequences = minibatch.rollout, online.sequences_of(minibatch.rollout)
    logprobs, entropy, hidden = online.policy_logprobs(
        model, settings, params, state.frozen, minibatch
    )
    coef = state.penalty_coef
    policy_loss, policy_metrics = _policy_loss(settings, logprobs, minibatch, coef, count)
    values = response_values(
        settings, value_model, params, state.frozen, sequences, hidden, minibatch.states
    )
    arrays = (values, rollout.values, minibatch.returns, rollout.mask)
    value_loss, value = functional.ppo_value_loss(
        *arrays, clip_range=settings.cliprange_value, denominator=count
    )
    loss = policy_loss + settings.vf_coef * value_loss
    metrics = {
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        **policy_metrics,
        "val/clipfrac_avg": value["clipfrac"],
    }
    if settings.entropy_coef:
        entropy_loss = -batch_mean(entropy, rollout.mask, count)
        loss += settings.entropy_coef * entropy_loss
        metrics["loss/entropy_avg"] = entropy_loss
    if texts is not None:
        policy = online.policy_parts(params, state.frozen)
        ptx_loss, _ = sft.text_loss(model, policy, texts, denominator=text_count)
        loss += settings.ptx_coef * ptx_loss
        metrics["loss/ptx_avg"] = ptx_loss
    return loss, metrics


def _policy_loss(settings, logprobs, minibatch, penalty_coef, count):
    """(loss, metrics) of the surrogate in the settings."""
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
        raise ValueError("the state holds no penalty_coef: create it with the same settings.")
    loss, policy = functional.kl_penalty_policy_loss(
        *arrays, kl_coef=penalty_coef, denominator=count
    )
    halved_squares = functional.kl_estimate(logprobs, rollout.logprobs, "k2")
    return loss, {
        "policy/approxkl_avg": batch_mean(halved_squares, rollout.mask, count),
        "val/ratio": policy["ratio"],
    }


def _adapt_kl_coef(settings, coef, kl, mask):
    """The weight of the KL penalty in the rewards of the next iteration."""
    if not settings.adaptive_kl:
        return coef
    num_samples = jnp.sum(mask.any(axis=1), dtype=jnp.float32)
    return functional.adaptive_kl_update(
        coef, kl, num_samples, target=settings.target, horizon=settings.horizon
    )


def _adapt_penalty(model, settings, state, params, experience):
    """(the coefficient for the next iteration, metrics), by how far this one moved the policy."""
    coef, scored = state.penalty_coef, experience.rollout
    if settings.surrogate != "kl_penalty":
        return coef, {}

    def score(part):
        return online.policy_logprobs(model, settings, params, state.frozen, part)[0]

    logprobs = map_microbatches(score, experience, settings.num_score_parts)
    # k3 of the old policy to the new one: its tokens, and the r - 1 - log r of the loss.
    kl = functional.masked_mean(
        functional.kl_estimate(scored.logprobs, logprobs, "k3"), scored.mask
    )
    adapted = functional.penalty_kl_update(coef, kl, target=settings.penalty_target)
    # After many halvings it would be 0 and never rise again, whatever the KL.
    limit = 2.0**20
    adapted = jnp.clip(adapted, settings.penalty_coef / limit, settings.penalty_coef * limit)
    return adapted, {"policy/penalty_kl": kl, "policy/penalty_coef": coef}
