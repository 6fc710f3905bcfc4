"""The equations of `dpo_loss`: one number per pair for each kind."""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.kl import MAX_LOG_RATIO
from rlhf_jax.functional.masking import on_all_devices
from rlhf_jax.preference_kinds import DIVERGENCE_KINDS

# The largest exponent of a score: its square, in "ipo", is within the range of float32.
MAX_EXPONENT = 30.0


def divergence_scores(log_ratios, divergence, alpha):
    """f'(t) of an f-divergence at t = e^log_ratio, up to a constant: 0 at t = 1."""
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "js_divergence":
        return jax.nn.log_sigmoid(log_ratios) + jnp.log(2.0)
    power = -1.0 if divergence == "forward_kl" else jnp.asarray(alpha, jnp.float32) - 1.0
    is_zero = jnp.abs(power) < 1e-6
    safe = jnp.where(is_zero, 1.0, power)
    scores = jnp.expm1(jnp.minimum(safe * log_ratios, MAX_EXPONENT)) / safe
    return jnp.where(is_zero, log_ratios, scores)


def pair_losses(kind, chosen, rejected, beta, label_smoothing, discopop_tau):
    """f32[B] of a kind that reads one pair at a time, from the scores of its responses."""
    if kind in DIVERGENCE_KINDS:
        return difference_losses(kind, chosen - rejected, beta, label_smoothing, discopop_tau)
    good, bad = beta * chosen, beta * rejected
    if kind == "nca_pair":
        return softplus(-good) + 0.5 * softplus(good) + 0.5 * softplus(bad)
    if kind == "bco_pair":
        return softplus(-good) + softplus(bad)
    if kind == "sppo_hard":
        return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)
    if kind == "apo_zero":
        return jax.nn.sigmoid(-good) + jax.nn.sigmoid(bad)
    return jax.nn.sigmoid(good) + jax.nn.sigmoid(bad - good)  # apo_down


def difference_losses(kind, difference, beta, label_smoothing, discopop_tau=None):
    """f32[B] of a kind that reads the difference of both responses only."""
    logits = beta * difference
    if kind == "hinge":
        # Not maximum, which splits the gradient at the corner.
        return jax.nn.relu(1.0 - logits)
    if kind == "ipo":
        return jnp.square(difference - 0.5 / beta)
    right, swapped = softplus(-logits), softplus(logits)
    if kind == "robust":
        mixed = (1.0 - label_smoothing) * right - label_smoothing * swapped
        return mixed / (1.0 - 2.0 * label_smoothing)
    if kind == "exo_pair":
        of_right = -right - jnp.log1p(-label_smoothing)
        of_swapped = -swapped - jnp.log(label_smoothing)
        return jax.nn.sigmoid(logits) * of_right + jax.nn.sigmoid(-logits) * of_swapped
    if kind == "discopop":
        gate = logits / discopop_tau
        # One exponential: e^-logits alone overflows, and 0 * inf is NaN.
        exponent = jnp.minimum(-softplus(-gate) - logits, MAX_LOG_RATIO)
        return jax.nn.sigmoid(-gate) * right + jnp.exp(exponent)
    return (1.0 - label_smoothing) * right + label_smoothing * swapped


def sorted_losses(above, below, mask, beta, label_smoothing):
    """(f32[B], bool[B]): losses of the sorted `above` minus the sorted `below`, and their mask.

    The padding entries come last.
    """
    mask, above, below = map(on_all_devices, (mask, above, below))
    is_padding, above = jax.lax.sort((~mask, above), num_keys=2)
    _, below = jax.lax.sort((~mask, below), num_keys=2)
    return difference_losses("sigmoid", above - below, beta, label_smoothing), ~is_padding


def softplus(x):
    """-log sigmoid(-x)."""
    return -jax.nn.log_sigmoid(-x)
