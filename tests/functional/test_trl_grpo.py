"""Losses, weights and advantages against GRPOTrainer of TRL 0.29.1 (golden/make_trl_grpo.py)."""

import jax
import numpy as np
import pytest

import rlhf_jax as rlhf
from rlhf_jax import functional
from tests.functional.test_golden import assert_close

REDUCTIONS = {
    "grpo": "sequence",
    "sapo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "dr_grpo": "constant",
    "luspo": "constant",
}


def settings_of(run, case):
    """Arguments of `grpo_loss` for a run of TRL."""
    kind, mode = run["loss_type"], run["importance_mode"]
    mask, weights = case["mask"], None
    if run["top_entropy_quantile"] < 1:
        share = float(run["top_entropy_quantile"])
        weights = rlhf.top_entropy_mask(case["entropy"], mask, share=share).astype(np.float32)
    if mode:
        level, mode = mode.split("_")
        weights, _ = rlhf.importance_weights(
            case["old_logprobs"], case["sampler_logprobs"], mask, level=level, cap=1.25, mode=mode
        )
    lengths = {"dr_grpo": float(run["max_completion_length"]), "luspo": 1.0}
    return {
        "kind": kind if kind in ("cispo", "sapo") else "clip",
        "level": run["importance_sampling_level"],
        "reduction": REDUCTIONS[kind],
        "clip_range": run["epsilon"],
        # There "cispo" is given the limit itself.
        "clip_range_high": run["epsilon_high"] - (1.0 if kind == "cispo" else 0.0),
        "dual_clip": run["delta"] if np.isfinite(run["delta"]) else None,
        "temperature_pos": run["sapo_temperature_pos"],
        "temperature_neg": run["sapo_temperature_neg"],
        "weights": weights,
        "ref_logprobs": case["ref_logprobs"],
        "kl_coef": run["beta"],
        "kl_bias_correction": bool(run["use_bias_correction_kl"]),
        "entropy": case["entropy"],
        "max_length": lengths.get(kind),
    }


def test_trls_losses(golden):
    """Not compiled: each run would be a program of its own."""
    case = golden("trl_grpo")["loss"]
    hyperparameters = {name: x for name, x in case.items() if name.startswith("hp/")}
    for index in range(len(case["out/loss"])):
        run = {name.removeprefix("hp/"): x[index].item() for name, x in hyperparameters.items()}
        settings = settings_of(run, case)

        def loss(logprobs, settings=settings):
            arrays = (case[name] for name in ("old_logprobs", "advantages", "mask"))
            return functional.grpo_loss(logprobs, *arrays, **settings)

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(case["logprobs"])
        assert_close(value, case["out/loss"][index], f"loss of {run}")
        assert_close(gradient, case["out/grad"][index], f"gradient of {run}")
        # TRL's are means over tokens, or over responses where each has one ratio.
        by_token = settings["reduction"] == "token"
        if by_token and run["beta"]:
            assert_close(metrics["kl"], case["out/kl"][index], f"kl of {run}")
        if by_token:
            assert_close(metrics["entropy"], case["out/entropy"][index], f"entropy of {run}")
        if by_token == (settings["level"] == "token"):
            for ours, theirs in (
                ("clipfrac_low", "clip_low"),
                ("clipfrac_high", "clip_high"),
                ("clipfrac_high", "cispo_clip"),
            ):
                expected = case[f"out/{theirs}"][index]
                assert np.isnan(expected) or metrics[ours] == pytest.approx(expected), (run, ours)


def test_trls_importance_weights(golden):
    cases = golden("trl_grpo")
    case, arrays = cases["importance"], cases["loss"]
    arrays = tuple(arrays[name] for name in ("old_logprobs", "sampler_logprobs", "mask"))
    for index, name in enumerate(case["hp/mode"]):
        level, mode = str(name).split("_")
        weights, metrics = rlhf.importance_weights(
            *arrays, level=level, cap=case["hp/cap"].item(), mode=mode
        )
        assert_close(weights, case["out/weights"][index], name)
        for each in ("min", "mean", "max"):
            assert_close(metrics[each], case[f"out/{each}"][index], f"{each} of {name}")
        assert 0 < metrics["capfrac"] < 1
    mean, maximum = rlhf.logprob_difference(*arrays)
    assert_close(mean, case["out/difference_mean"][0], "mean")
    assert_close(maximum, case["out/difference_max"][0], "max")


def test_trls_advantages(golden):
    case = golden("trl_grpo")["advantages"]
    scores = case["scores"]
    batch = rlhf.group_advantages(scores, scale="batch")
    assert_close(batch, case["out/batch"], "batch")
    normalized = rlhf.normalize_advantages(
        rlhf.leave_one_out_advantages(scores), np.ones(scores.shape, bool)
    )
    assert_close(normalized, case["out/rloo_normalized"], "normalized")
    several, mask = case["several"], ~np.isnan(case["several"])
    decoupled = rlhf.decoupled_advantages(several, case["reward_weights"], mask)
    assert mask.any(axis=2).all()
    assert_close(decoupled, case["out/decoupled"], "decoupled")


def test_trls_overlong_penalty(golden):
    case = golden("trl_grpo")["overlong"]
    limits = {name: case[f"hp/{name}"].item() for name in ("max_length", "buffer")}
    assert_close(rlhf.overlong_penalty(case["lengths"], **limits), case["out/penalty"], "penalty")
