"""Optimization on single responses that are desirable or not, without pairs: KTO and APO-zero."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import functional
from rlhf_jax.batches import Sequences, UnpairedBatch
from rlhf_jax.errors import InputError
from rlhf_jax.functional.masking import batch_mean
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.training import trainable
from rlhf_jax.training.epochs import Metrics
from rlhf_jax.training.kto_settings import TRAINER, Settings
from rlhf_jax.training.responses import exceeds, init_state_with_reference, logprobs_of
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
      InputError: more layers are to be trained than the model has.
    """
    del key
    return init_state_with_reference(
        model, params, settings, optimizer or make_optimizer(TRAINER.optimizer)
    )


def make_step(
    model: Model, settings: Settings, *, optimizer: optax.GradientTransformation | None = None
) -> Callable[[TrainState, UnpairedBatch, jax.Array], tuple[TrainState, Metrics]]:
    """A pure step (state, batch, key) -> (state, metrics) of `functional.kto_loss`.

    The KL estimate of "kto" is the mean over the batch, on all devices, of policy - reference for
    the other responses, each after the prompt of another example, and not below 0; it has no
    gradient. That of "apo_zero_unpaired" is 0.

    The metrics, f32[] each, have the names of TRL. A reward is beta * (policy - reference):

        train/loss, train/grad_norm     the norm is that before clipping
        rewards/chosen, rewards/rejected
                                        means over the desirable and over the undesirable responses;
                                        0 without any
        rewards/margins                 their difference
        rewards/accuracies              share of responses with a reward on the right side of that
                                        of the KL estimate
        logps/chosen, logps/rejected    means of the log-probabilities, sums over tokens, in nats
        train/kl                        the KL estimate, in nats per response
        perf/tokens                     real tokens of prompts and responses

    Args:
      model: the policy; it runs without dropout.
      settings: of the loss.
      optimizer: by default that of the trainer's record.

    The batch holds `ref_response` and `ref_other`, of `make_reference_step`, unless the state holds
    a reference.

    Ethayarajh et al., KTO, section 4.1 (arXiv:2402.01306); APO-zero: D'Oosterlinck et al.,
    Anchored Preference Optimization, section 4 (arXiv:2408.06266), on unpaired responses as in TRL.
    """
    optimizer = optimizer or make_optimizer(TRAINER.optimizer)
    steps = settings.gradient_accumulation_steps

    def step(state, batch, key):
        del key
        if state.reference is None and batch.ref_response is None:
            raise InputError(
                "kto compares with a reference: give the batch ref_response and ref_other, from "
                "make_reference_step, or set kto.precompute_ref to false."
            )
        loss_fn = functools.partial(_loss, model, settings, state.reference)
        state, metrics = offline_step(loss_fn, _counts, optimizer, state, batch, None, steps)
        masks = (batch.prompt_mask, batch.mask)
        tokens = sum(jnp.sum(mask, dtype=jnp.float32) for mask in masks)
        chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
        return state, {**metrics, "rewards/margins": chosen - rejected, "perf/tokens": tokens}

    return step


def make_reference_step(
    model: Model, settings: Settings
) -> Callable[[Params, UnpairedBatch], Metrics]:
    """A pure (params, batch) -> {"ref_response": f32[B], "ref_other": f32[B]} of a reference.

    The parameters are full. The results are fields of the batch that `make_step` reads.
    """

    def reference(params, batch):
        return _reference_fields(model, settings, Trainable(params), batch)

    return reference


def make_eval_step(model: Model, settings: Settings) -> Callable[[Params, UnpairedBatch], Metrics]:
    """A pure (params, batch) -> sums over responses of "loss" and "accuracy", and their "count".

    The parameters are full, and a batch has its reference log-probabilities. The KL estimate is
    that of this batch.
    """

    def evaluate(params, batch):
        _, metrics = _loss(model, settings, None, None, params, batch, None, None)
        count = jnp.sum(batch.valid, dtype=jnp.float32)
        means = {"loss": metrics["loss"], "accuracy": metrics["rewards/accuracies"]}
        return {**{name: mean * count for name, mean in means.items()}, "count": count}

    return evaluate


def _loss(model, settings, reference, frozen, params, batch, key, denominator):
    """(loss, metrics); `reference` has the shape of `params`, or is None."""
    del key
    parts = Trainable(params, frozen)
    states = _states(model, settings, parts, batch)
    if reference is not None:
        own = Trainable(reference, frozen)
        batch = batch._replace(**_reference_fields(model, settings, own, batch, states))
    logps = logprobs_of(model, parts, _sequences(batch), states[0]).sums
    kl = _kl(model, settings, jax.lax.stop_gradient(parts), batch, states[1])
    desirable, undesirable = batch.valid & batch.labels, batch.valid & ~batch.labels
    loss, _ = functional.kto_loss(
        logps,
        logps,
        batch.ref_response,
        batch.ref_response,
        kl,
        beta=settings.beta,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        chosen_mask=desirable,
        rejected_mask=undesirable,
        denominator=denominator,
    )
    ratios = logps - batch.ref_response
    is_right = jnp.where(batch.labels, exceeds(ratios, kl, logps), exceeds(kl, ratios, logps))
    chosen, rejected, count = (None,) * 3
    if denominator is not None:
        chosen, rejected, count = denominator[0], denominator[1], jnp.sum(denominator)
    return loss, {
        "loss": loss,
        "rewards/chosen": batch_mean(settings.beta * ratios, desirable, chosen),
        "rewards/rejected": batch_mean(settings.beta * ratios, undesirable, rejected),
        "rewards/accuracies": batch_mean(is_right, batch.valid, count),
        "logps/chosen": batch_mean(logps, desirable, chosen),
        "logps/rejected": batch_mean(logps, undesirable, rejected),
        "kl": kl,
    }


def _states(model, settings, params, batch):
    """Results of the frozen layers for the responses, and for the others where there is a KL."""
    own = trainable.frozen_states(model, params, _sequences(batch))
    if settings.kind != "kto":
        return own, None
    return own, trainable.frozen_states(model, params, _other_sequences(batch))


def _kl(model, settings, params, batch, states):
    """f32[]: the estimate of the KL divergence from the reference, in nats per response."""
    if settings.kind != "kto":
        return jnp.zeros(())
    logps = logprobs_of(model, params, _other_sequences(batch), states).sums
    return jnp.maximum(batch_mean(logps - batch.ref_other, batch.valid), 0.0)


def _reference_fields(model, settings, params, batch, states=(None, None)):
    """The reference's log-probabilities; 0 for the other responses where no KL is estimated."""
    fields = {"ref_response": logprobs_of(model, params, _sequences(batch), states[0]).sums}
    if settings.kind == "kto":
        other = logprobs_of(model, params, _other_sequences(batch), states[1]).sums
        return {**fields, "ref_other": other}
    return {**fields, "ref_other": jnp.zeros_like(fields["ref_response"])}


def _sequences(batch):
    return Sequences(batch.prompts, batch.prompt_mask, batch.responses, batch.mask)


def _other_sequences(batch):
    return Sequences(batch.prompts, batch.prompt_mask, batch.other, batch.other_mask)


def _counts(batch):
    """f32[2]: the numbers of desirable and of undesirable responses."""
    groups = batch.valid & batch.labels, batch.valid & ~batch.labels
    return jnp.stack([jnp.sum(group, dtype=jnp.float32) for group in groups])
