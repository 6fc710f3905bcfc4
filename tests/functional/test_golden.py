"""From scores to losses, against numbers of published code (tests/golden)."""

import functools

import jax
import numpy as np
import pytest

import rlhf_jax as rlhf
from rlhf_jax import functional


def assert_close(actual, expected, name):
    np.testing.assert_allclose(actual, expected, rtol=5e-6, atol=5e-6, err_msg=name)


def settings(case):
    return {name.removeprefix("hp/"): float(x) for name, x in case.items() if "hp/" in name}


@functools.partial(jax.jit, static_argnames=("unbiased", "whiten_rewards"))
def ppo(case, hp, mask, *, unbiased, whiten_rewards):
    """The way from scores to losses and gradients, under the names of the golden files."""
    rewards, kl = functional.token_rewards(
        case["scores"], case["old_logprobs"], case["ref_logprobs"], mask, kl_coef=hp["kl_coef"]
    )
    outputs = {"rewards": rewards, "non_score_reward": -hp["kl_coef"] * kl}
    if whiten_rewards:
        rewards = functional.masked_whiten(rewards, mask, shift_mean=False, unbiased=unbiased)
    advantages, returns = functional.gae(
        rewards, case["old_values"], mask, gamma=hp["gamma"], lam=hp["lam"]
    )
    whitened = functional.masked_whiten(advantages, mask, unbiased=unbiased)
    (policy_loss, policy), policy_grad = jax.value_and_grad(
        functional.ppo_policy_loss, has_aux=True
    )(case["logprobs"], case["old_logprobs"], whitened, mask, clip_range=hp["clip_range"])
    (value_loss, value), value_grad = jax.value_and_grad(functional.ppo_value_loss, has_aux=True)(
        case["values"], case["old_values"], returns, mask, clip_range=hp["clip_range_value"]
    )
    return outputs | {
        "rewards_whitened": rewards,
        "advantages_raw": advantages,
        "advantages": whitened,
        "returns": returns,
        "policy_loss": policy_loss,
        "policy_clipfrac": policy["clipfrac"],
        "approxkl": policy["approxkl"],
        "value_loss": value_loss,
        "value_clipfrac": value["clipfrac"],
        "entropy": functional.masked_mean(functional.token_entropy(case["logits"]), mask),
        "returns_mean": functional.masked_mean(returns, mask),
        "returns_var": functional.masked_var(returns, mask, unbiased=unbiased),
        "total_loss": policy_loss + hp["vf_coef"] * value_loss,
        "policy_grad": policy_grad,
        "value_grad": hp["vf_coef"] * value_grad,
        "logprobs": functional.token_logprobs(case["logits"], case["tokens"]),
    }


def inputs(case):
    return {name: x for name, x in case.items() if "/" not in name}


def compare(outputs, case, mask):
    for name, output in outputs.items():
        output, expected = np.asarray(output), case[f"out/{name}"]
        assert output.shape == expected.shape, name
        if output.ndim:
            output, expected = output[mask], expected[mask]
        assert_close(output, expected, name)


@pytest.mark.parametrize("index", range(6))
def test_minichatgpt(golden, index):
    case = golden("minichatgpt")[f"c{index}"]
    mask = case["mask"]
    outputs = ppo(inputs(case), settings(case), mask, unbiased=True, whiten_rewards=False)
    del outputs["rewards_whitened"]
    outputs["grad_policy_loss_logprobs"] = outputs.pop("policy_grad")
    outputs["grad_scaled_value_loss_values"] = outputs.pop("value_grad")
    assert_close(outputs.pop("logprobs")[mask], case["logprobs"][mask], "logprobs")
    compare(outputs, case, mask)


@pytest.mark.parametrize("index", range(10))
def test_openai(golden, index):
    case = golden("openai_klctl")[f"c{index}"]
    hp, mask = settings(case), np.ones(case["tokens"].shape, bool)
    outputs = ppo(inputs(case), hp, mask, unbiased=False, whiten_rewards=bool(hp["whiten_rewards"]))
    outputs["grad_total_logprobs"] = outputs.pop("policy_grad")
    outputs["grad_total_values"] = outputs.pop("value_grad")
    assert_close(outputs.pop("logprobs"), case["logprobs"], "logprobs")
    compare(outputs, case, mask)


@pytest.mark.parametrize("index", range(4))
def test_openai_whitening(golden, index):
    case = golden("openai_klctl")[f"whiten{index}"]
    mask = np.ones(case["x"].shape, bool)
    whitened = rlhf.masked_whiten(case["x"], mask, unbiased=False)
    kept = rlhf.masked_whiten(case["x"], mask, shift_mean=False, unbiased=False)
    compare({"whiten": whitened, "whiten_keep_mean": kept}, case, mask)


@pytest.mark.parametrize(
    ("file", "prefix"),
    [("minichatgpt", "klctl"), *[("openai_klctl", f"klctl{index}") for index in range(4)]],
)
def test_adaptive_kl_controllers(golden, file, prefix):
    case = golden(file)[prefix]
    hp = settings(case)
    coef, coefs = hp["init"], []
    for observed in case["observed"]:
        coef = rlhf.adaptive_kl_update(
            coef, observed, hp["num_samples"], target=hp["target"], horizon=hp["horizon"]
        )
        coefs.append(float(coef))
    # Some record the coefficient before the first update too.
    np.testing.assert_allclose(coefs, case["values"][-len(coefs) :], rtol=5e-6)


def test_the_gae_notebook(golden):
    case = golden("minichatgpt")["notebook"]
    rewards, values = (case[name].astype(np.float32)[None] for name in ("rewards", "values"))
    mask = np.ones(rewards.shape, bool)
    advantages, returns = rlhf.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages[0], case["printed_advantages"], atol=2e-4)
    np.testing.assert_allclose(returns[0], case["printed_returns"], atol=2e-4)
    assert_close(advantages[0], case["run_advantages"], "advantages")
    assert_close(returns[0], case["run_returns"], "returns")
    whitened = rlhf.masked_whiten(advantages, mask)
    assert_close(whitened[0], case["run_advantages_whitened"], "whitened")


REDUCTIONS = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}


def grpo(case, index, **more):
    """((loss, metrics), gradient) of a run of TRL's GRPO."""
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    logprobs, old_logprobs, advantages, mask = (case[name] for name in names)
    settings = {
        name: float(case[f"hp/{name}"][index])
        for name in ("kl_coef", "clip_range", "clip_range_high")
    }
    reduction = REDUCTIONS[str(case["hp/loss_type"][index])]
    ref_logprobs = case["ref_logprobs"] if settings["kl_coef"] else None

    def loss(logprobs):
        return rlhf.grpo_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            ref_logprobs=ref_logprobs,
            reduction=reduction,
            **settings,
            **more,
        )

    return jax.value_and_grad(loss, has_aux=True)(logprobs)


@pytest.mark.parametrize("index", range(12))
def test_trls_grpo(golden, index):
    """All four ways of averaging, the KL to a reference, asymmetric clipping.

    "bnpo" and "dapo" divide by the number of tokens, on one device and on all of them: here the
    same. TRL's metrics are over all tokens whatever the loss averages over: ours of "token".
    """
    case = golden("trl")["grpo"]
    (loss, metrics), gradient = grpo(case, index)
    assert_close(loss, case["out/loss"][index], "loss")
    assert_close(gradient, case["out/grad"][index], "gradient")
    if case["hp/loss_type"][index] in ("bnpo", "dapo"):
        assert_close(metrics["clipfrac"], case["out/clip_region"][index], "clipfrac")
        assert case["out/clip_low"][index] > 0
        assert case["out/clip_high"][index] > 0
        if case["hp/kl_coef"][index]:
            assert_close(metrics["kl"], case["out/kl"][index], "kl")


@pytest.mark.parametrize("index", range(4))
def test_trls_grpo_with_an_empty_response(golden, index):
    """Under "grpo" TRL counts a response without a token, with a loss of 0; ours is a mean over
    those with a token, so that the padding of a batch changes nothing, and is TRL's with the number
    of all responses as the denominator.
    """
    case = golden("trl")["grpo_empty_row"]
    count = case["mask"].shape[0]
    assert not case["mask"][-1].any()
    by_response = case["hp/loss_type"][index] == "grpo"
    more = {"denominator": count} if by_response else {}
    (loss, _), gradient = grpo(case, index, **more)
    assert_close(loss, case["out/loss"][index], "loss")
    assert_close(gradient, case["out/grad"][index], "gradient")
    if by_response:
        (ours, _), _ = grpo(case, index)
        assert_close(ours, case["out/loss"][index] * count / (count - 1), "loss over real ones")


def test_trls_group_advantages(golden):
    case = golden("trl")["advantages"]
    advantages = rlhf.group_advantages(case["scores"])
    assert_close(advantages, case["out/grpo_group"], "grpo")
    unscaled = rlhf.group_advantages(case["scores"], scale=False)
    assert_close(unscaled, case["out/grpo_none"], "dr_grpo")
    assert_close(rlhf.leave_one_out_advantages(case["scores"]), case["out/rloo"], "rloo")
