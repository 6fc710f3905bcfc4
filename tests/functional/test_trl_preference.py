"""Losses on preferences against TRL 0.29.1's own trainers (tests/golden/make_trl_preference.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import functional

METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


def assert_trls(case, index, outputs, rtol=5e-6):
    for name, x in outputs.items():
        expected = case[f"out/{name}"][index]
        # Gradients of the same size: a difference of two sums is rounded to their size.
        atol = 1e-6 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(x, expected, rtol=rtol, atol=atol, err_msg=name)


def coefficients(case, index, *names):
    return {name: float(case[f"hp/{name}"][index]) for name in names}


def sums(logprobs, mask, ld_alpha):
    """Log-probabilities of the chosen and the rejected responses, which are halves of the batch."""
    if np.isnan(ld_alpha):
        return jnp.split(jnp.where(mask, logprobs, 0.0).sum(1), 2)
    chosen, rejected = np.split(mask.sum(1), 2)
    others = np.concatenate([rejected, chosen])
    return jnp.split(
        functional.length_desensitized_logprobs(logprobs, mask, others, alpha=ld_alpha), 2
    )


def pair_weights(logprobs, mask):
    """WPO's, of the two tokens of the script."""
    logits = jnp.stack([logprobs, jnp.log(-jnp.expm1(logprobs))], axis=-1)
    entropy = functional.token_collision_entropy(logits)
    chosen, rejected = jnp.split(functional.wpo_weights(logprobs, entropy, mask), 2)
    return chosen * rejected


@pytest.mark.parametrize("index", range(46))
def test_trls_dpo(golden, index):
    """Every kind at two beta, divergences, length desensitisation, WPO's weights, mixtures.

    Its "sigmoid" has no label_smoothing here: TRL ignores it.
    """
    case = golden("trl_preference")["dpo"]
    logprobs, ref, mask = (case[name] for name in ("logprobs", "ref_logprobs", "mask"))
    kinds = tuple(str(kind) for kind in case["hp/kinds"][index] if kind)
    ld_alpha = case["hp/ld_alpha"][index]
    lengths = mask.sum(1)

    def loss(logprobs):
        chosen = jnp.where(mask, logprobs, 0.0)[: len(mask) // 2]
        return functional.mixed_dpo_loss(
            *sums(logprobs, mask, ld_alpha),
            *sums(ref, mask, ld_alpha),
            kinds=kinds,
            kind_weights=tuple(map(float, case["hp/kind_weights"][index][: len(kinds)])),
            divergence=str(case["hp/divergence"][index]),
            lengths=tuple(np.split(lengths, 2)),
            weights=pair_weights(logprobs, mask) if case["hp/use_weighting"][index] else None,
            nll=-chosen.sum() / mask[: len(mask) // 2].sum() if "sft" in kinds else None,
            **coefficients(case, index, "beta", "label_smoothing", "divergence_alpha"),
        )

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    # TRL's alpha divergence is in float32.
    is_alpha = case["hp/divergence"][index] == "alpha_divergence"
    outputs = {"loss": value, "grad": gradient, **metrics}
    assert_trls(case, index, outputs, rtol=2e-5 if is_alpha else 5e-6)


def test_the_runs_of_trl_cover_every_kind(golden):
    from rlhf_jax.preference_kinds import DIVERGENCES, DPO_KINDS

    case = golden("trl_preference")["dpo"]
    assert {kind for kind in case["hp/kinds"].ravel() if kind} == set(DPO_KINDS)
    assert set(case["hp/divergence"]) == set(DIVERGENCES)
    assert len(case["out/loss"]) == 46


@pytest.mark.parametrize("index", range(5))
def test_trls_cpo_and_simpo(golden, index):
    case = golden("trl_preference")["cpo"]
    kind = str(case["hp/kind"][index])
    shared = coefficients(case, index, "beta", "label_smoothing")

    def loss(chosen, rejected):
        if kind == "simpo":
            more = coefficients(case, index, "gamma")
            return functional.simpo_loss(chosen, rejected, **shared, **more)
        more = coefficients(case, index, "nll_weight")
        return functional.cpo_loss(chosen, rejected, case["nll"], kind=kind, **shared, **more)

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        case["policy_chosen"], case["policy_rejected"]
    )
    outputs = {"loss": value, "grad_chosen": gradients[0], "grad_rejected": gradients[1]}
    assert_trls(case, index, outputs | metrics)


@pytest.mark.parametrize("index", range(2))
@pytest.mark.parametrize("name", ["apo_zero_unpaired", "bco"])
def test_trls_losses_without_pairs(golden, name, index):
    """BCO's first step has the mean of its own batch, which `delta` is by default."""
    case = golden("trl_preference")[name]
    shared = coefficients(case, index, "beta")

    def loss(chosen, rejected):
        arrays = chosen, rejected, case["ref_chosen"], case["ref_rejected"]
        if name == "bco":
            delta = float(case["out/delta"][index]) if index else None
            return functional.bco_loss(*arrays, delta, **shared)
        weights = coefficients(case, index, "desirable_weight", "undesirable_weight")
        return functional.kto_loss(*arrays, kind=name, **shared, **weights)

    (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        case["policy_chosen"], case["policy_rejected"]
    )
    outputs = {"loss": value, "grad_chosen": gradients[0], "grad_rejected": gradients[1]}
    rewards = {key: metrics[key] for key in ("chosen_reward", "rejected_reward")}
    assert_trls(case, index, outputs | rewards)
