"""Losses on preferences give TRL's numbers, but where the two differ by design."""

import jax
import numpy as np
import pytest

import rlhf_jax as rlhf
from rlhf_jax import functional
from tests.functional.preference_by_loop import PAIR_METRICS, dpo_by_loop


def hyperparameters(case, index):
    names = [name.removeprefix("hp/") for name in case if name.startswith("hp/")]
    values = {name: case[f"hp/{name}"][index] for name in names}
    return {name: str(x) if name == "kind" else float(x) for name, x in values.items()}


def assert_trls(case, index, output, gradients, names=("accuracy", *PAIR_METRICS[1:])):
    loss, metrics = output
    actual = {"loss": loss, "grad_chosen": gradients[0], "grad_rejected": gradients[1]}
    actual |= {name: metrics[name] for name in names}
    for name, x in actual.items():
        expected = case[f"out/{name}"][index]
        np.testing.assert_allclose(x, expected, rtol=5e-6, atol=1e-6, err_msg=name)


def value_and_gradients(loss, chosen, rejected):
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(chosen, rejected)


@pytest.mark.parametrize("index", range(9))
def test_dpo_loss_is_trls(golden, index):
    """But for two things.

    TRL divides log-ratios by lengths for "ipo", and then logs rewards of sums: ours are those of
    the loss, so its metrics are compared without lengths. And its "sigmoid" ignores
    label_smoothing (the second case has 0.3): line 28 of docs/facts.md.
    """
    case = golden("trl")["dpo"]
    settings = hyperparameters(case, index)
    ref = case["ref_chosen"], case["ref_rejected"]
    if settings["kind"] != "robust":
        del settings["label_smoothing"]
    lengths = (case["chosen_lengths"], case["rejected_lengths"])

    def loss(chosen, rejected, lengths=lengths if settings["kind"] == "ipo" else None):
        return rlhf.dpo_loss(chosen, rejected, *ref, lengths=lengths, **settings)

    policy = case["policy_chosen"], case["policy_rejected"]
    (value, _), gradients = value_and_gradients(loss, *policy)
    assert_trls(case, index, (value, loss(*policy, None)[1]), gradients)


def test_28_ipo_on_sums_and_on_means_are_different_losses(golden):
    """Line 28 of docs/facts.md: on one batch 23.72 of sums and 24.78 of means. Here TRL's batch.

    The paper and OpenRLHF take sums, our default; TRL takes means: `lengths`.
    """
    case = golden("trl")["dpo"]
    index = list(case["hp/kind"]).index("ipo")
    logprobs = [
        case[name] for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    ]
    settings = {"kind": "ipo", "beta": float(case["hp/beta"][index])}
    lengths = case["chosen_lengths"], case["rejected_lengths"]
    sums, _ = rlhf.dpo_loss(*logprobs, **settings)
    means, _ = rlhf.dpo_loss(*logprobs, lengths=lengths, **settings)
    np.testing.assert_allclose(means, case["out/loss"][index], rtol=5e-6)
    np.testing.assert_allclose(sums, dpo_by_loop(logprobs, 0.1, "ipo", 0.0, None)[0], rtol=5e-6)
    assert abs(sums - means) > 0.5


def test_28_label_smoothing_does_nothing_in_trls_sigmoid_and_does_in_ours(golden):
    """Line 28 of docs/facts.md. What it should give TRL's CPO does give: tested below."""
    case = golden("trl")["dpo"]
    settings = hyperparameters(case, 1)
    assert settings["kind"] == "sigmoid"
    assert settings["label_smoothing"] == 0.3
    logprobs = [
        case[name] for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    ]
    plain, _ = rlhf.dpo_loss(*logprobs, beta=settings["beta"])
    smoothed, _ = rlhf.dpo_loss(*logprobs, **settings)
    np.testing.assert_allclose(plain, case["out/loss"][1], rtol=5e-6)
    assert abs(smoothed - plain) > 0.05


@pytest.mark.parametrize("index", range(4))
def test_without_a_reference_dpo_loss_is_trls_cpo(golden, index):
    """Contrastive preference optimization without its likelihood term; conservative in case 0."""
    case = golden("trl")["cpo"]
    settings = hyperparameters(case, index)
    nothing = np.zeros_like(case["policy_chosen"])

    def loss(chosen, rejected):
        return functional.dpo_loss(chosen, rejected, nothing, nothing, **settings)

    policy = case["policy_chosen"], case["policy_rejected"]
    assert_trls(case, index, *value_and_gradients(loss, *policy))


@pytest.mark.parametrize("index", range(3))
def test_simpo_loss_is_trls(golden, index):
    """TRL's default adds the likelihood loss (`cpo_alpha`), which is not SimPO's: off there."""
    case = golden("trl")["simpo"]
    settings = hyperparameters(case, index)
    assert settings.pop("kind") == "simpo"

    def loss(chosen, rejected):
        return rlhf.simpo_loss(chosen, rejected, **settings)

    policy = case["policy_chosen"], case["policy_rejected"]
    assert_trls(case, index, *value_and_gradients(loss, *policy))


@pytest.mark.parametrize("index", range(2))
def test_orpo_loss_is_trls(golden, index):
    case = golden("trl")["orpo"]
    settings = hyperparameters(case, index)

    def loss(chosen, rejected):
        return rlhf.orpo_loss(chosen, rejected, case["nll"], **settings)

    policy = case["policy_chosen"], case["policy_rejected"]
    assert_trls(case, index, *value_and_gradients(loss, *policy))


@pytest.mark.parametrize("index", range(4))
def test_kto_loss_is_trls(golden, index):
    """TRL logs no accuracy for KTO. In the last case kl is negative, and clamped by both."""
    case = golden("trl")["kto"]
    settings, kl = hyperparameters(case, index), case["kl"][index]
    assert (kl < 0) == (case["out/kl_clamped"][index] == 0) == (index == 3)

    def loss(chosen, rejected):
        return rlhf.kto_loss(
            chosen, rejected, case["ref_chosen"], case["ref_rejected"], kl, **settings
        )

    policy = case["policy_chosen"], case["policy_rejected"]
    output, gradients = value_and_gradients(loss, *policy)
    assert_trls(case, index, output, gradients, ("chosen_reward", "rejected_reward"))
