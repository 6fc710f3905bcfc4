"""Checks and metrics of the losses on log-probabilities of responses."""

import numbers

import jax.numpy as jnp

from rlhf_jax.functional.expect import expect
from rlhf_jax.functional.masking import batch_mean, zero_off_mask


def masked_responses(mask, axis="B", mask_name="mask", /, **logprobs):
    """(mask, *logprobs) after checks; the mask is True by default, the others are 0 off it."""
    expected = {name: (x, axis, float) for name, x in logprobs.items()}
    expect(**expected)
    if mask is None:
        mask = jnp.ones_like(next(iter(logprobs.values())), dtype=bool)
    expect(**expected, **{mask_name: (mask, axis, bool)})
    return mask, *zero_off_mask(mask, *logprobs.values())


def pair_metrics(chosen, rejected, beta, mask, denominator):
    """Metrics of pairs whose rewards are beta * chosen and beta * rejected."""
    return {
        "accuracy": batch_mean(chosen > rejected, mask, denominator),
        "margin": batch_mean(beta * (chosen - rejected), mask, denominator),
        "chosen_reward": batch_mean(beta * chosen, mask, denominator),
        "rejected_reward": batch_mean(beta * rejected, mask, denominator),
    }


def expect_label_smoothing(kind, label_smoothing, smoothed_kinds):
    """Raises for values that a kind does not support; a traced value is not known."""
    if not isinstance(label_smoothing, numbers.Real):
        return
    value = float(label_smoothing)
    if kind not in smoothed_kinds and value != 0:
        raise ValueError(
            f"label_smoothing must be 0 with kind {kind!r}, which has none, but is {value}: use "
            "kind 'sigmoid' or 'robust', or leave it out."
        )
    if kind == "robust" and not 0 <= value < 0.5:
        raise ValueError(
            "label_smoothing must be at least 0 and below 0.5 with kind 'robust', which divides by "
            f"1 - 2 * label_smoothing, but is {value}."
        )
    if kind == "exo_pair" and not 0 < value < 1:
        raise ValueError(
            "label_smoothing must be above 0 and below 1 with kind 'exo_pair', which is infinite "
            f"at both, but is {value}: its paper uses 0.001."
        )
