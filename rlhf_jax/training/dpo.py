"""Preference optimization on pairs of responses, without a reward model: DPO and its family."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import PairBatch
from rlhf_jax.errors import InputError
from rlhf_jax.functional.masking import batch_mean
from rlhf_jax.models.adapters import adapters_of
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.rollout.score import response_logits
from rlhf_jax.training import trainable
from rlhf_jax.training.dpo_settings import TRAINER, Settings
from rlhf_jax.training.epochs import Metrics
from rlhf_jax.training.responses import init_state_with_reference, logprobs_of, preference_metrics
from rlhf_jax.training.reward import sequences_of
from rlhf_jax.training.sft import full_params
from rlhf_jax.training.state import TrainState, make_optimizer, offline_step
from rlhf_jax.training.trainable import Trainable

__all__ = [
    "Settings",
    "full_params",
    "init_state",
    "make_eval_step",
    "make_reference_step",
    "make_step",
]


# Kinds whose `logps` are means over the tokens of a response.
MEANS = ("simpo", "orpo")


def init_state(
    model: Model,
    params: Params,
    settings: Settings,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state before the first step.

    The state holds `params` themselves: a step that donates it consumes them. Without
    `precompute_ref` it holds a copy of their trained part as well, the reference.

    Args:
      params: the model's full parameters.
      key: unused, as nothing is random; every trainer has it.

    Raises:
      InputError: more layers are to be trained than the model has, or the reference follows the
        policy and the model has adapters.
    """
    del key
    if settings.sync_ref_model and adapters_of(model) is not None:
        raise InputError(
            "dpo.sync_ref_model mixes the parameters of policy and reference, which those of "
            "adapters cannot be; set it to false, or train without adapters."
        )
    return init_state_with_reference(
        model, params, settings, optimizer or make_optimizer(TRAINER.optimizer)
    )


def make_step(
    model: Model, settings: Settings, *, optimizer: optax.GradientTransformation | None = None
) -> Callable[[TrainState, PairBatch, jax.Array], tuple[TrainState, Metrics]]:
    """A pure step (state, batch, key) -> (state, metrics) of preference optimization.

    A prompt runs once for both of its responses. The metrics, f32[] each and means over pairs where
    nothing else is said, have the names of TRL:

        train/loss, train/grad_norm     the norm is that before clipping
        rewards/chosen, rewards/rejected
                                        beta * (policy - reference), of sums over tokens; without a
                                        reference beta * logps
        rewards/margins                 rewards/chosen - rewards/rejected
        rewards/accuracies              share of pairs with a positive margin, above the rounding of
                                        the sums: 2^-19 of the log-probabilities of a pair
        logps/chosen, logps/rejected    log-probabilities in nats: sums over tokens, for "simpo" and
                                        "orpo" means
        train/implicit_kl               mean of policy - reference over all responses, in nats: an
                                        estimate of the KL only for responses of the policy
        train/nll_loss                  of kinds with a likelihood loss, in nats per token
        perf/tokens                     real tokens of the batch

    Args:
      model: the policy; it runs without dropout.
      settings: of the loss.
      optimizer: by default that of the trainer's record.

    The batch holds `ref_chosen` and `ref_rejected`, of `make_reference_step`, where the loss has a
    reference and the state does not hold it.
    """
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)
    steps, count = settings.gradient_accumulation_steps, functools.partial(_counts, settings)

    def step(state, batch, key):
        del key
        _check_reference(settings, state, batch)
        loss_fn = functools.partial(_loss, model, settings, state.reference)
        state, metrics = offline_step(loss_fn, count, optimizer, state, batch, None, steps)
        if settings.sync_ref_model:
            state = state._replace(reference=_synchronised(settings, state))
        masks = (batch.prompt_mask, batch.chosen_mask, batch.rejected_mask)
        tokens = sum(jnp.sum(mask, dtype=jnp.float32) for mask in masks)
        return state, {**metrics, "perf/tokens": tokens}

    return step


def make_reference_step(
    model: Model, settings: Settings
) -> Callable[[Params, PairBatch], dict[str, jax.Array]]:
    """A pure (params, batch) -> {"ref_chosen": f32[B], "ref_rejected": f32[B]} of a reference.

    The parameters are full. The results are fields of the batch that `make_step` reads.
    """

    def reference(params, batch):
        logprobs = logprobs_of(model, Trainable(params), sequences_of(batch))
        return _reference_fields(settings, logprobs)

    return reference


def make_eval_step(model: Model, settings: Settings) -> Callable[[Params, PairBatch], Metrics]:
    """A pure (params, batch) -> sums over pairs of "loss", "accuracy" and others, and "count".

    The parameters are full; a batch has its reference log-probabilities, where the loss reads any.
    The sums are those of the loss, of the metrics "accuracy" and "margin" of the rewards, and of
    "longer_wins": the accuracy of the rule that the longer response, in tokens, is the chosen one,
    ties counting half. A likelihood in the loss is the mean over tokens of the batch, times its
    pairs; kinds that sort do so within the batch.
    """

    def evaluate(params, batch):
        count = _counts(settings, batch)
        per_pair = jnp.maximum(count["tokens"], 1.0) / jnp.maximum(count["pairs"], 1.0)
        sums = {"pairs": jnp.ones(()), "tokens": per_pair}
        loss, metrics = _loss(model, settings, None, None, params, batch, None, sums)
        lengths = [jnp.sum(x, axis=1) for x in (batch.chosen_mask, batch.rejected_mask)]
        longer = 0.5 + 0.5 * jnp.sign(lengths[0] - lengths[1])
        return {
            "loss": loss,
            "accuracy": metrics["rewards/accuracies"],
            "margin": metrics["rewards/margins"],
            "longer_wins": jnp.sum(jnp.where(batch.valid, longer, 0.0)),
            "count": count["pairs"],
        }

    return evaluate


def _loss(model, settings, reference, frozen, params, batch, key, denominator):
    """(loss, metrics) of a kind; `reference` has the shape of `params`, or is None."""
    del key
    sequences, parts = sequences_of(batch), Trainable(params, frozen)
    states = trainable.frozen_states(model, parts, sequences)
    is_orpo = settings.all_kinds == ("orpo",)
    policy = logprobs_of(model, parts, sequences, states, with_prompts=is_orpo)
    if reference is not None:
        own = logprobs_of(model, Trainable(reference, frozen), sequences, states)
        batch = batch._replace(**_reference_fields(settings, own))
    counts = denominator or {"pairs": None, "tokens": None}
    nll = _nll(policy, counts["tokens"])
    options = {"beta": settings.beta, "mask": batch.valid, "denominator": counts["pairs"]}
    if settings.has_reference:
        weights = _wpo_weights(model, parts, policy) if settings.use_weighting else None
        loss = _dpo_loss(settings, policy, batch, nll, weights, options)
    else:
        loss = _reference_free_loss(settings, policy, nll, options)
    metrics = {"loss": loss, **_metrics(settings, policy, batch, counts["pairs"])}
    if settings.reads_nll:
        metrics["nll_loss"] = nll
    return loss, metrics


def _reference_free_loss(settings, policy, nll, options):
    """f32[]: the loss of a kind without a reference."""
    chosen, rejected = _columns(policy.sums if settings.kind == "cpo" else policy.means)
    if settings.kind == "orpo":
        return functional.orpo_loss(chosen, rejected, nll, **options)[0]
    options = {**options, "label_smoothing": settings.label_smoothing}
    if settings.kind == "simpo":
        return functional.simpo_loss(chosen, rejected, gamma=settings.gamma, **options)[0]
    weight = settings.nll_weight
    return functional.cpo_loss(chosen, rejected, nll, nll_weight=weight, **options)[0]


def _nll(policy, denominator):
    """f32[]: a mean over the tokens of chosen responses, and of their prompts where computed."""
    logprobs, mask = policy.tokens[:, 0], policy.mask[:, 0]
    if policy.prompt_mask is not None:
        is_real = jnp.any(mask, axis=1, keepdims=True)
        logprobs = jnp.concatenate([policy.prompt_tokens, logprobs], axis=1)
        mask = jnp.concatenate([policy.prompt_mask & is_real, mask], axis=1)
    return -batch_mean(logprobs, mask, denominator)


def _dpo_loss(settings, policy, batch, nll, weights, options):
    """f32[]: the weighted sum of kinds with a reference."""
    kinds = settings.all_kinds
    chosen, rejected = _columns(_response_sums(settings, policy))
    loss, _ = functional.mixed_dpo_loss(
        chosen,
        rejected,
        batch.ref_chosen,
        batch.ref_rejected,
        kinds=kinds,
        kind_weights=settings.loss_weights or None,
        label_smoothing=settings.label_smoothing,
        lengths=_columns(policy.lengths) if "ipo" in kinds else None,
        divergence=settings.f_divergence_type,
        divergence_alpha=settings.f_alpha_divergence_coef,
        discopop_tau=settings.discopop_tau,
        nll=nll if "sft" in kinds else None,
        weights=weights,
        **options,
    )
    return loss


def _response_sums(settings, logprobs):
    """f32[B, 2]: sums over tokens, in which the excess length of a response may weigh less."""
    if settings.ld_alpha is None:
        return logprobs.sums
    lengths = logprobs.lengths
    sums = [
        functional.length_desensitized_logprobs(
            logprobs.tokens[:, k], logprobs.mask[:, k], lengths[:, 1 - k], alpha=settings.ld_alpha
        )
        for k in range(2)
    ]
    return jnp.stack(sums, axis=1)


def _wpo_weights(model, params, policy):
    """f32[B]: the products of both responses' weights, without a gradient."""
    full = jax.lax.stop_gradient(trainable.full_params(model, params))
    hidden, tokens = jax.lax.stop_gradient((policy.hidden, policy.tokens))
    entropy = functional.token_collision_entropy(
        response_logits(model, full, hidden, temperature=1.0)
    )
    weights = [
        functional.wpo_weights(tokens[:, k], entropy[:, k], policy.mask[:, k]) for k in range(2)
    ]
    return weights[0] * weights[1]


def _reference_fields(settings, logprobs):
    chosen, rejected = _columns(_response_sums(settings, logprobs))
    return {"ref_chosen": chosen, "ref_rejected": rejected}


def _synchronised(settings, state):
    """The reference after the step: mixed with the policy every so many steps (TR-DPO)."""
    alpha, is_due = settings.ref_model_mixup_alpha, state.step % settings.ref_model_sync_steps == 0

    def mixed(reference, param):
        return jnp.where(is_due, alpha * param + (1.0 - alpha) * reference, reference)

    return jax.tree.map(mixed, state.reference, state.params)


def _metrics(settings, policy, batch, denominator):
    """The metrics of `make_step` under TRL's names."""
    beta, has_means = settings.beta, settings.all_kinds[0] in MEANS
    logps = policy.means if has_means else _response_sums(settings, policy)
    rewards = beta * logps
    if settings.has_reference:
        rewards -= beta * jnp.stack([batch.ref_chosen, batch.ref_rejected], axis=1)
    values = preference_metrics(rewards, logps, beta)
    if settings.has_reference:
        values["implicit_kl"] = jnp.mean(rewards, axis=1) / beta
    return {name: batch_mean(x, batch.valid, denominator) for name, x in values.items()}


def _columns(x):
    """(chosen, rejected), [B] each, of an array [B, 2]."""
    return x[:, 0], x[:, 1]


def _counts(settings, batch):
    """The divisors of the sums over pairs, and over the tokens of the likelihood: f32[] each."""
    mask = batch.chosen_mask & batch.valid[:, None]
    tokens = jnp.sum(mask, dtype=jnp.float32)
    if settings.all_kinds == ("orpo",):
        before = batch.prompt_mask[:, 1:] & batch.prompt_mask[:, :-1] & batch.valid[:, None]
        tokens += jnp.sum(before, dtype=jnp.float32)
    return {"pairs": jnp.sum(batch.valid, dtype=jnp.float32), "tokens": tokens}


def _check_reference(settings, state, batch):
    """Raises an InputError where the loss has a reference, and neither state nor batch has."""
    if settings.has_reference and state.reference is None and batch.ref_chosen is None:
        raise InputError(
            f"dpo.kind {settings.kind} compares with a reference: give the batch ref_chosen and "
            "ref_rejected, from make_reference_step, or set dpo.precompute_ref to false."
        )
