"""The KL divergence to a reference, estimates of it, and controllers of its coefficient."""

import jax.numpy as jnp

from rlhf_jax.functional.expect import expect, expect_one_of, expect_scalars
from rlhf_jax.functional.logprobs import shift_logits

KINDS = ("k1", "k2", "k3")

# exp overflows float32 at 89. At 40 its square is still finite, and so are sums of many squares;
# beyond it the value is constant and its gradient 0.
MAX_LOG_RATIO = 40.0


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Estimate of KL(policy || reference) from tokens that the policy sampled.

        d = logprobs - ref_logprobs
        k1 = d              unbiased
        k2 = d^2 / 2        biased, low variance, never negative
        k3 = e^-d - 1 + d   unbiased, low variance, never negative

    k3 is constant below d = -40, to stay within the range of float32.

    In a reward, without a gradient, k1 is the unbiased one. In a loss, differentiated by the
    policy, the expected gradient for a token given its prefix is 0 with k1, that of KL(policy ||
    reference) with k2, and that of KL(reference || policy) with k3.

    Args:
      logprobs: float[...] of the sampled tokens under the policy, in nats.
      ref_logprobs: float[...], the same under the reference.
      kind: "k1", "k2" or "k3".

    Returns:
      f32[...] in nats per token.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong, or an unknown kind.

    Schulman, Approximating KL Divergence (joschu.net/blog/kl-approx.html).

    >>> print(kl_estimate(jnp.array([-1.0, -2.0]), jnp.array([-2.0, -1.0]), "k2"))
    [0.5 0.5]
    """
    expect(logprobs=(logprobs, "...", float), ref_logprobs=(ref_logprobs, "...", float))
    expect_one_of(kind=(kind, KINDS))
    difference = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    return exp_minus_linear(-difference)


def token_kl(logits, ref_logits):
    """KL(policy || reference) over the full vocabulary, which `kl_estimate` estimates.

        sum_v p[v] (log p[v] - log q[v])    p, q = softmax(logits), softmax(ref_logits)

    Args:
      logits: float[..., V] of the policy. A logit of -inf has probability 0 and contributes 0, and
        gradients are finite.
      ref_logits: float[..., V] of the reference; -inf at a finite logit of the policy makes the
        divergence infinite. If a logit of either is NaN or inf, or all are -inf, the divergence is
        NaN and the gradient 0.

    Returns:
      f32[...] in nats; rounding may give a negative number for nearly equal distributions.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Kullback and Leibler, On Information and Sufficiency, eq. 2.4 (Annals of Mathematical Statistics
    22, 1951).

    >>> print(token_kl(jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.0, 0.0, 0.0])))
    0.40546513
    """
    expect(logits=(logits, "...V", float), ref_logits=(ref_logits, "...V", float))
    shifted, is_distribution = shift_logits(logits)
    ref_shifted, is_ref_distribution = shift_logits(ref_logits)
    weights = jnp.exp(shifted)
    total, ref_total = jnp.sum(weights, axis=-1), jnp.sum(jnp.exp(ref_shifted), axis=-1)
    # 0 * inf is NaN, in the product and in its gradient.
    is_possible = ~jnp.isneginf(shifted)
    finite, ref_finite = (jnp.where(is_possible, x, 0.0) for x in (shifted, ref_shifted))
    mean_difference = jnp.sum(weights * (finite - ref_finite), axis=-1) / total
    kl = mean_difference - jnp.log(total) + jnp.log(ref_total)
    return jnp.where(is_distribution & is_ref_distribution, kl, jnp.nan)


def adaptive_kl_update(coef, observed_kl, num_samples, *, target, horizon):
    """The KL coefficient after num_samples more episodes, adapted towards a target KL.

        coef * (1 + clip(observed_kl / target - 1, -0.2, 0.2) * num_samples / horizon)

    Args:
      coef: float[], the current coefficient.
      observed_kl: float[], mean KL per episode in nats, summed over its tokens.
      num_samples: episodes since the last update.
      target: the KL per episode to keep, in nats.
      horizon: number of episodes over which the coefficient changes by a fifth at most.

    Returns:
      f32[].

    Raises:
      ValueError: naming the argument that is not a single number.

    Ziegler et al., Fine-Tuning Language Models from Human Preferences, section 2.2
    (arXiv:1909.08593).

    >>> coef = adaptive_kl_update(0.2, 12.0, 256, target=6.0, horizon=10_000)
    >>> print(f"{coef:.6f}")
    0.201024
    """
    expect_scalars(
        coef=coef, observed_kl=observed_kl, num_samples=num_samples, target=target, horizon=horizon
    )
    coef, observed_kl, num_samples, target, horizon = (
        jnp.asarray(x, jnp.float32) for x in (coef, observed_kl, num_samples, target, horizon)
    )
    error = jnp.clip(observed_kl / target - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * (num_samples / horizon))


def penalty_kl_update(coef, observed_kl, *, target):
    """The KL coefficient after a policy update, halved or doubled if the KL is off target.

        coef / 2    if observed_kl < target / 1.5
        coef * 2    if observed_kl > target * 1.5

    Args:
      coef: float[], the current coefficient.
      observed_kl: float[], mean KL between the old policy and the new one, in nats.
      target: the KL to keep, in the same unit.

    Returns:
      f32[].

    Raises:
      ValueError: naming the argument that is not a single number.

    Schulman et al., Proximal Policy Optimization Algorithms, section 4 (arXiv:1707.06347).

    >>> print(penalty_kl_update(0.2, 0.05, target=0.01))
    0.4
    """
    expect_scalars(coef=coef, observed_kl=observed_kl, target=target)
    coef, observed_kl, target = (jnp.asarray(x, jnp.float32) for x in (coef, observed_kl, target))
    doubled = jnp.where(observed_kl > target * 1.5, coef * 2.0, coef)
    return jnp.where(observed_kl < target / 1.5, coef / 2.0, doubled)


def limited_exp(x):
    """e^x for f32[...]; constant beyond x = 40."""
    return jnp.exp(jnp.minimum(x, MAX_LOG_RATIO))


def exp_minus_linear(x):
    """e^x - 1 - x for f32[...], never negative; constant beyond x = 40."""
    x = jnp.minimum(x, MAX_LOG_RATIO)
    is_small = jnp.abs(x) < 0.1
    # Near 0 all digits of expm1(x) - x cancel; the Taylor series is exact to 1e-8 up to 0.1.
    small = jnp.where(is_small, x, 0.0)
    series = 1.0 + small / 3 * (1.0 + small / 4 * (1.0 + small / 5 * (1.0 + small / 6)))
    return jnp.where(is_small, 0.5 * jnp.square(small) * series, jnp.expm1(x) - x)
