"""Makes tests/golden/trl_grpo.npz: what GRPOTrainer of TRL 0.29.1 computes, beyond trl.npz.

    pip install torch==2.13.0 'trl==0.29.1' 'transformers<5' numpy     # Python 3.11
    python tests/golden/make_trl_grpo.py

As make_trl.py: the trainer's own methods run unchanged, in float64, on given log-probabilities.
"""

import importlib.metadata
import pathlib

import numpy as np
import torch
from groups import advantages_of, compute_grpo, draw_grpo, score
from stand_ins import B, T, fixed, ragged, stack
from trl import GRPOTrainer, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

FILE = pathlib.Path(__file__).parent / "trl_grpo.npz"
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CAP = 1.25

# What differs from `DEFAULTS` in each run of the loss.
DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "epsilon": 0.2,
    "epsilon_high": 0.3,
    "delta": np.inf,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "top_entropy_quantile": 1.0,
    "max_completion_length": T,
    "importance_mode": "",
}
RUNS = (
    {"delta": 1.4},
    {"importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence", "loss_type": "dapo", "epsilon": 0.05, "beta": 0.1},
    {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    {"loss_type": "cispo", "epsilon_high": 1.3},
    {"loss_type": "cispo", "epsilon_high": 1.3, "beta": 0.1, "use_bias_correction_kl": True},
    {"loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence"},
    {"loss_type": "sapo"},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0, "beta": 0.1},
    {"loss_type": "dr_grpo", "max_completion_length": 11},
    {"loss_type": "dapo", "top_entropy_quantile": 0.4, "beta": 0.1},
    *({"loss_type": "bnpo", "importance_mode": mode, "beta": 0.1} for mode in MODES),
)


def make_loss(rng):
    """GRPOTrainer._compute_loss, with the weights that the rollout gives to off-policy tokens."""
    mask = ragged(rng, B)
    arrays, inputs = draw_grpo(rng, mask)
    entropies = np.exp(rng.normal(size=(B, T))).astype(np.float32)
    steps = np.round(512 * 0.2 * rng.normal(size=(B, T))).astype(np.float32) / 512
    sampler_logprobs = np.minimum(arrays["old_logprobs"] + steps, np.float32(-1 / 512))
    corrections = {
        mode: correct(mode, arrays["old_logprobs"], sampler_logprobs, mask) for mode in MODES
    }
    runs = [
        run_loss(arrays["logprobs"], inputs, entropies, corrections, DEFAULTS | run) for run in RUNS
    ]
    arrays |= {"entropy": entropies, "sampler_logprobs": sampler_logprobs}
    modes = {"hp/mode": np.array(MODES), "hp/cap": CAP} | stack([*corrections.values()])
    return stack(runs) | arrays, modes


def run_loss(logprobs, inputs, entropies, corrections, run):
    mode = run["importance_mode"]
    if mode:
        inputs = inputs | {"importance_sampling_ratio": fixed(corrections[mode]["out/weights"])}
    finite_delta = run["delta"] if np.isfinite(run["delta"]) else None
    metrics, loss, gradient = compute_grpo(
        logprobs,
        inputs,
        entropies,
        run | {"delta": finite_delta},
        epsilon_low=run["epsilon"],
        use_vllm=bool(mode),
        **{
            name: run[name]
            for name in (
                "loss_type",
                "importance_sampling_level",
                "beta",
                "epsilon_high",
                "top_entropy_quantile",
                "max_completion_length",
            )
        },
    )
    names = {
        "kl": "kl",
        "entropy": "entropy",
        "clip_low": "clip_ratio/low_mean",
        "clip_high": "clip_ratio/high_mean",
        "cispo_clip": "cispo_clip_ratio",
    }
    return (
        {f"hp/{name}": value for name, value in run.items()}
        | {"out/loss": loss, "out/grad": gradient}
        | {f"out/{ours}": (metrics[name] or [np.nan])[0] for ours, name in names.items()}
    )


def correct(mode, logprobs, sampler_logprobs, mask):
    """The importance weights of _generate_and_score_completions, and its metrics `sampling/*`."""
    lengths = mask.sum(1)
    metrics, output = score(
        GRPOTrainer,
        np.zeros((B, 1)),
        B,
        ids=[[1] * n for n in lengths],
        logprobs=logprobs,
        sampler_logprobs=[
            row[:n].tolist() for row, n in zip(sampler_logprobs, lengths, strict=True)
        ],
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_cap=CAP,
        scale_rewards="none",
    )
    weights = output["importance_sampling_ratio"].numpy()
    ratios, differences = (
        f"sampling/{name}" for name in ("importance_sampling_ratio", "sampling_logp_difference")
    )
    return (
        {"out/weights": np.broadcast_to(weights, mask.shape) * mask}
        | {f"out/{name}": metrics[f"{ratios}/{name}"][0] for name in ("min", "mean", "max")}
        | {
            f"out/difference_{name}": metrics[f"{differences}/{name}"][0]
            for name in ("mean", "max")
        }
    )


def make_advantages(rng):
    """Advantages of groups of six: by the batch's deviation, normalized RLOO, GDPO with gaps."""
    scores = rng.normal(size=(4, 6)).astype(np.float32)
    scores[2] = 0.7
    several = np.round(rng.normal(size=(4, 6, 3)) * [1.0, 10.0, 0.1], 3).astype(np.float32)
    several[1, :, 0] = 0.5
    several[0, 1, 2] = several[3, :2, 1] = several[2, 1:, 0] = np.nan
    weights = np.float32([1.0, 0.5, 2.0])
    _, decoupled = score(
        GRPOTrainer,
        several.reshape(-1, 3),
        6,
        reward_weights=fixed(weights),
        multi_objective_aggregation="normalize_then_sum",
    )
    return {
        "scores": scores,
        "several": several,
        "reward_weights": weights,
        "out/batch": advantages_of(GRPOTrainer, scores, scale_rewards="batch"),
        "out/rloo_normalized": advantages_of(RLOOTrainer, scores, normalize_advantages=True),
        "out/decoupled": decoupled["advantages"].numpy().reshape(4, 6),
    }


def make_overlong():
    lengths = np.arange(1, 26, dtype=np.int32)
    penalty = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=8)
    return {
        "lengths": lengths,
        "hp/max_length": 20.0,
        "hp/buffer": 8.0,
        "out/penalty": np.array(penalty([[1] * n for n in lengths])),
    }


def main():
    assert importlib.metadata.version("trl") == "0.29.1"
    torch.set_num_threads(1)
    loss, importance = make_loss(np.random.default_rng(0))
    groups = {
        "loss": loss,
        "importance": importance,
        "advantages": make_advantages(np.random.default_rng(1)),
        "overlong": make_overlong(),
    }
    arrays = {
        f"{group}/{name}": np.asarray(x)
        for group, case in groups.items()
        for name, x in case.items()
    }
    for name, x in arrays.items():
        print(name, x.dtype, x.shape, np.array2string(x.ravel()[:6], precision=5))
    np.savez_compressed(FILE, **arrays)
    print(FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
