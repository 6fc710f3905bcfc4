"""Mistakes of published code: one test for each line of docs/facts.md about the mathematics.

Each shows the right number, and that the usual mistake would give another. The numbers in the names
are those of the page; test_docs.py holds that each line names a test that exists.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rlhf

# Of the formulas: test_all.py holds on both ends of the versions that each function compiles.
pytestmark = pytest.mark.newest

EOS = 9


@pytest.fixture
def logits(rng):
    return rng.normal(size=(5, 7, 10)).astype(np.float32)


@pytest.fixture
def tokens(rng):
    return rng.integers(0, EOS, size=(5, 7))


def test_02_eos_is_an_action_even_where_it_is_the_padding_too():
    tokens = np.array([[4, EOS, EOS, EOS]])
    mask = rlhf.response_mask(tokens, (EOS,))
    np.testing.assert_array_equal(mask, [[True, True, False, False]])
    assert not np.array_equal(mask, tokens != EOS)
    logprobs, advantages = np.zeros((1, 4), np.float32), np.float32([[1, 2, 3, 4]])
    gradient = jax.grad(lambda x: rlhf.reinforce_loss(x, advantages, mask)[0])(logprobs)
    np.testing.assert_array_equal(gradient, [[-0.5, -1.0, 0.0, 0.0]])


def test_04_one_temperature_divides_new_old_and_reference_logits(logits, tokens, ragged_mask):
    warm = rlhf.token_logprobs(logits / 0.7, tokens)
    zeros = np.zeros(len(tokens), np.float32)
    _, kl = rlhf.token_rewards(zeros, warm, warm, ragged_mask, kl_coef=0.1)
    np.testing.assert_array_equal(kl, 0)
    _, metrics = rlhf.ppo_policy_loss(warm, warm, jnp.ones_like(warm), ragged_mask)
    assert (metrics["ratio"], metrics["approxkl"]) == (1, 0)
    cold = rlhf.token_logprobs(logits, tokens)
    _, kl = rlhf.token_rewards(zeros, cold, warm, ragged_mask, kl_coef=0.1)
    assert np.any(np.abs(kl) > 0.1)


def test_06_fractions_of_scores_survive(ragged_mask):
    zeros = np.zeros(ragged_mask.shape, np.float32)
    scores = np.float32([0.25, -0.75, 0.5, 0.5, 0.999])
    rewards, _ = rlhf.token_rewards(scores, zeros, zeros, ragged_mask, kl_coef=0.1)
    np.testing.assert_array_equal(np.sum(rewards, axis=1), scores * ragged_mask.any(axis=1))
    with pytest.raises(ValueError, match=r"^scores must be float\[B\] with B = 5, but is int"):
        rlhf.token_rewards(scores.astype(int), zeros, zeros, ragged_mask, kl_coef=0.1)


def test_06_the_penalty_has_the_sign_that_costs_what_the_reference_would_not_say():
    likelier, rarer = np.full((1, 1), -1.0, np.float32), np.full((1, 1), -3.0, np.float32)
    rewards, _ = rlhf.token_rewards(
        np.zeros(1, np.float32), likelier, rarer, np.ones((1, 1), bool), kl_coef=0.5
    )
    assert rewards[0, 0] == -1.0


@pytest.mark.parametrize("d", [-3.0, -0.5, 0.0, 0.5, 3.0])
def test_07_the_three_estimates_of_the_kl(d):
    estimates = [rlhf.kl_estimate(jnp.float32(d), jnp.float32(0), kind) for kind in ("k1", "k2")]
    estimates.append(rlhf.kl_estimate(jnp.float32(d), jnp.float32(0), "k3"))
    np.testing.assert_allclose(estimates, [d, d**2 / 2, np.exp(-d) - 1 + d], rtol=1e-6, atol=1e-7)
    assert min(estimates[1:]) >= 0


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.0256), (60.0, 1 + 0.2 * 0.0256), (0.0, 1 - 0.2 * 0.0256)],
)
def test_08_the_adaptive_coefficient_is_clipped_and_counts_episodes(kl, factor):
    coef = rlhf.adaptive_kl_update(0.2, kl, 256, target=6.0, horizon=10_000)
    np.testing.assert_allclose(coef, 0.2 * factor, rtol=1e-6)


def test_09_the_score_lands_on_eos_and_not_on_the_padding_behind_it():
    mask = rlhf.response_mask(np.array([[3, EOS, EOS, EOS]]), (EOS,))
    zeros = np.zeros((1, 4), np.float32)
    rewards, _ = rlhf.token_rewards(np.float32([2.5]), zeros, zeros, mask, kl_coef=0.1)
    np.testing.assert_array_equal(rewards, [[0, 2.5, 0, 0]])


def test_10_what_follows_the_first_stop_token_is_no_part_of_the_response():
    mask = rlhf.response_mask(np.array([[3, EOS, 5, EOS, 6], [1, 2, 3, 4, 5]]), (EOS,))
    np.testing.assert_array_equal(np.sum(mask, axis=1), [2, 5])


def test_11_whitening_has_bessels_correction_keeps_the_mean_of_rewards_and_sees_no_padding():
    x, mask = np.float32([[1, 2], [6, 100]]), np.array([[True, True], [True, False]])
    real = np.array([1.0, 2.0, 6.0])
    for unbiased in (True, False):
        deviation = np.sqrt(real.var(ddof=int(unbiased)) + 1e-8)
        whitened = rlhf.masked_whiten(x, mask, unbiased=unbiased)
        np.testing.assert_allclose(whitened[mask], (real - 3) / deviation, rtol=1e-6)
        kept = rlhf.masked_whiten(x, mask, shift_mean=False, unbiased=unbiased)
        np.testing.assert_allclose(kept[mask], (real - 3) / deviation + 3, rtol=1e-6)


def test_11_statistics_are_those_of_the_global_batch_and_not_of_a_part(rng):
    x = rng.normal(size=(4, 8)).astype(np.float32) + np.float32([[0], [0], [5], [5]])
    mask = np.ones(x.shape, bool)
    parts = np.concatenate([rlhf.masked_whiten(half, mask[:2]) for half in (x[:2], x[2:])])
    assert np.abs(np.asarray(rlhf.masked_whiten(x, mask)) - parts).max() > 0.5


def test_12_returns_are_taken_before_advantages_are_whitened(rng, ragged_mask):
    rewards, values = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    advantages, returns = rlhf.gae(rewards, values, ragged_mask, gamma=1.0, lam=1.0)
    to_go = rlhf.rewards_to_go(rewards, ragged_mask)
    np.testing.assert_allclose(returns, to_go, rtol=1e-5, atol=1e-5)
    too_late = rlhf.masked_whiten(advantages, ragged_mask) + jnp.where(ragged_mask, values, 0)
    assert np.abs(too_late - to_go).max() > 0.1


def test_13_the_clip_takes_the_larger_loss_and_values_half_the_larger_square():
    mask, one = np.ones((1, 4), bool), np.ones((1, 4), np.float32)
    log_ratio = np.log(np.float32([[1.5, 1.5, 0.5, 0.5]]))
    advantages = np.float32([[1, -1, 1, -1]])
    loss, _ = rlhf.ppo_policy_loss(log_ratio, 0 * one, advantages, mask)
    np.testing.assert_allclose(loss, (-1.2 + 1.5 - 0.5 + 0.8) / 4, rtol=1e-6)
    values = np.float32([[0.5, 0.5, 0.1, -0.5]])
    loss, _ = rlhf.ppo_value_loss(values, 0 * one, one, mask)
    np.testing.assert_allclose(loss, 0.5 * (0.8**2 + 0.8**2 + 0.9**2 + 1.5**2) / 4, rtol=1e-6)


def test_19_accumulated_gradients_weigh_tokens_and_not_micro_batches(rng, ragged_mask):
    logprobs, advantages = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)

    def loss(examples, **keywords):
        parts = (x[examples] for x in (logprobs, advantages, ragged_mask))
        return float(rlhf.reinforce_loss(*parts, **keywords)[0])

    complete, halves = loss(slice(None)), (slice(0, 2), slice(2, 5))
    count = float(ragged_mask.sum())
    np.testing.assert_allclose(
        sum(loss(half, denominator=count) for half in halves), complete, 1e-5
    )
    assert abs(np.mean([loss(half) for half in halves]) - complete) > 0.01


def test_21_metrics_leave_padding_out(logits, ragged_mask):
    entropy = np.asarray(rlhf.token_entropy(logits))
    mean = rlhf.masked_mean(entropy, ragged_mask)
    np.testing.assert_allclose(mean, entropy[ragged_mask].mean(), rtol=1e-6)
    # Padding that is written as log-probabilities of 1 makes minus their mean no entropy at all.
    padded = np.where(ragged_mask, np.log(0.5), 1.0).astype(np.float32)
    assert rlhf.masked_mean(-padded, ragged_mask) > 0 > -padded.mean()


def test_25_the_logarithm_of_a_sigmoid_is_taken_at_once():
    chosen, rejected = np.float32([-90]), np.float32([0])
    naive = jax.value_and_grad(lambda x: -jnp.log(jax.nn.sigmoid(x - 0)).mean())(chosen)
    assert not np.isfinite(naive[0])
    assert np.isnan(naive[1]).all()
    loss = lambda x: rlhf.pairwise_loss(x, rejected)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(chosen)
    np.testing.assert_allclose([value, gradient[0]], [90, -1], rtol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_25_a_ratio_does_not_overflow_at_a_log_ratio_of_89(advantage):
    assert np.exp(np.float64(89)) > np.finfo(np.float32).max
    old, new, mask = (
        np.zeros((1, 1), np.float32),
        np.full((1, 1), 89, np.float32),
        np.ones((1, 1), bool),
    )
    loss = lambda x: rlhf.ppo_policy_loss(x, old, np.full((1, 1), advantage, np.float32), mask)[0]  # noqa: E731
    assert np.isfinite(jax.value_and_grad(loss)(new)[0])
    assert np.isfinite(jax.value_and_grad(loss)(new)[1]).all()


def test_26_whitened_rewards_do_not_leak_padding_into_returns(rng, ragged_mask):
    rewards, values = rng.normal(2.0, 1.0, size=(2, *ragged_mask.shape)).astype(np.float32)
    rewards = np.where(ragged_mask, rewards, 0)
    inside = rlhf.masked_whiten(rewards, ragged_mask, shift_mean=False)
    everywhere = rlhf.masked_whiten(rewards, np.ones_like(ragged_mask), shift_mean=False)
    np.testing.assert_array_equal(inside[~ragged_mask], 0)
    assert np.abs(everywhere[~ragged_mask]).min() > 0.05
    # What stands there does not matter: the returns know the mask, too.
    spoilt = np.where(ragged_mask, inside, everywhere)
    for a, b in zip(
        rlhf.gae(inside, values, ragged_mask), rlhf.gae(spoilt, values, ragged_mask), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_26_ratio_approxkl_and_the_loss_are_means_over_real_tokens(rng, ragged_mask):
    new, advantages = rng.normal(size=(2, *ragged_mask.shape)).astype(np.float32)
    old = np.zeros_like(new)
    loss, metrics = rlhf.ppo_policy_loss(new, old, advantages, ragged_mask)
    real = np.float64(new[ragged_mask])
    np.testing.assert_allclose(metrics["ratio"], np.exp(real).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["approxkl"], np.mean(real**2) / 2, rtol=1e-6)
    over_all, _ = rlhf.ppo_policy_loss(new, old, advantages, np.ones_like(ragged_mask))
    assert abs(over_all - loss) > 0.01


def test_30_dpo_starts_at_log_2_without_an_ordered_pair(rng):
    logps = [jnp.asarray(rng.normal(-30, 5, 6), jnp.float32) for _ in range(2)]
    loss, metrics = rlhf.dpo_loss(*logps, *logps, beta=0.1)
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward"):
        assert metrics[name] == 0


def test_34_the_constant_of_dr_grpo_does_not_depend_on_the_width_of_the_batch(rng, ragged_mask):
    logprobs = jnp.asarray(rng.normal(-2, 1, ragged_mask.shape), jnp.float32)
    advantages = jnp.asarray(rng.normal(size=len(ragged_mask)), jnp.float32)
    arguments = {"reduction": "constant", "max_length": 64}
    losses = []
    for more in (0, 9):
        padded, mask = (jnp.pad(x, ((0, 0), (0, more))) for x in (logprobs, ragged_mask))
        losses.append(rlhf.grpo_loss(padded, None, advantages, mask, **arguments)[0])
    expected = -(np.asarray(advantages) * np.asarray(ragged_mask).sum(axis=1)).sum()
    expected /= 64 * len(ragged_mask)
    np.testing.assert_allclose(losses, [expected] * 2, rtol=1e-5)
