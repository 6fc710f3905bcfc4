"""Losses on preferences by loops in float64."""

import numpy as np

KINDS = ["sigmoid", "hinge", "ipo", "robust"]
PAIR_METRICS = ["accuracy", "margin", "chosen_reward", "rejected_reward"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pair_loss(kind, h, beta, s):
    """One pair's loss by the formula as it is written, in float64."""
    if kind == "sigmoid":
        return -(1 - s) * np.log(sigmoid(beta * h)) - s * np.log(sigmoid(-beta * h))
    if kind == "hinge":
        return max(0.0, 1 - beta * h)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    flipped = -np.log(sigmoid(-beta * h))
    return (-(1 - s) * np.log(sigmoid(beta * h)) - s * flipped) / (1 - 2 * s)


def dpo_by_loop(logprobs, beta, kind, s, lengths):
    losses, wins, chosen_rewards, rejected_rewards = [], [], [], []
    for b in range(len(logprobs[0])):
        policy_c, policy_r, ref_c, ref_r = (float(x[b]) for x in logprobs)
        chosen, rejected = policy_c - ref_c, policy_r - ref_r
        if lengths is not None:
            chosen, rejected = chosen / lengths[0][b], rejected / lengths[1][b]
        losses.append(pair_loss(kind, chosen - rejected, beta, s))
        wins.append(chosen > rejected)
        chosen_rewards.append(beta * chosen)
        rejected_rewards.append(beta * rejected)
    margin = np.mean(chosen_rewards) - np.mean(rejected_rewards)
    return (
        np.mean(losses),
        np.mean(wins),
        margin,
        np.mean(chosen_rewards),
        np.mean(rejected_rewards),
    )


def draw_logprobs(rng, *shape):
    return -np.exp(rng.normal(size=shape)).astype(np.float32)


def draw(rng, *shape, scale=3.0):
    return (-scale * np.exp(0.5 * rng.normal(size=shape))).astype(np.float32)


def assert_loss_and_metrics(output, expected, rtol=1e-5):
    loss, metrics = output
    assert sorted(metrics) == sorted(PAIR_METRICS)
    actual = [loss, *(metrics[name] for name in PAIR_METRICS)]
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-6)


def kto_by_loop(chosen, rejected, z, beta, weights):
    """Of the log-ratios of both sorts."""
    losses = [weights[0] * (1 - sigmoid(beta * (float(x) - z))) for x in chosen]
    losses += [weights[1] * (1 - sigmoid(beta * (z - float(x)))) for x in rejected]
    right = [float(x) > z for x in chosen] + [float(x) < z for x in rejected]
    rewards = [beta * np.mean(np.float64(x)) if len(x) else 0.0 for x in (chosen, rejected)]
    return np.mean(losses), np.mean(right), rewards[0] - rewards[1], *rewards
