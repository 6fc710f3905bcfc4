"""All stages on one device and on eight, and the comparison of their results."""

import itertools
from pathlib import Path

import numpy as np

from tests import small

# Every way to write 8 as a product of three.
FACTORISATIONS = tuple(
    sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8
)
STEPS = 10
STAGES = ("sft", "reward", "ppo", "frozen")
# Sums in another order differ in their last bits, which Adam's early steps, of nearly the sign of
# the gradient, enlarge.
TOLERANCE = 1e-5


def mesh_name(sizes):
    return "x".join(map(str, sizes))


def make_configs(folder, one_device, sizes):
    """The stages on a mesh, each from the results of the stages on one device, by name.

    "ppo" mixes in texts; "frozen" has frozen layers, a value model of its own, an evaluation, and
    computes layers again;
    """
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    logging = {"eval_every": 0, "samples_every": 1, "num_samples": 8, "progress": False}
    shared = {"mesh": mesh, "logging": logging}
    data = {"builtin_rows": 8 * STEPS, "eval_rows": 0}
    model = {"n_layer": 2, "n_head": 8, "n_embd": 64}
    sft, rewarded = one_device / "sft", one_device / "reward"
    options = {"normalize_before": True, "normalize_after": True, "num_layers_unfrozen": 1}
    texts = {"builtin_rows": 32, "eval_rows": 0, "max_length": 16}

    def ppo(name, data=data, **sections):
        iterations = {"total_episodes": 8 * STEPS, **sections.pop("ppo", {})}
        return small.ppo(
            folder / name, sft, rewarded, **shared, data=data, ppo=iterations, **sections
        )

    frozen = {"num_layers_unfrozen": 1, "value_model": "policy"}
    return {
        "sft": small.sft(folder / "sft", **shared, data=data, model=model),
        "reward": small.reward(folder / "reward", sft, **shared, data=data, reward=options),
        "ppo": ppo("ppo", ppo={"ptx_coef": 0.5}, ptx=texts),
        "frozen": ppo("frozen", data={**data, "eval_rows": 8}, ppo=frozen, model={"remat": "full"}),
    }


def differences(one, several):
    """By metric, how far two run folders lie apart, as a share of what is tolerated."""
    logs = [small.rows(Path(folder) / "metrics.jsonl") for folder in (one, several)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert len(logs[0]) == STEPS
    found: dict[str, float] = {}
    for expected, actual in zip(*logs, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            share = abs(actual[name] - value) / (TOLERANCE * (1 + abs(value)))
            found[name] = max(found.get(name, 0.0), share)
    return found


def sampled(folder):
    """The responses that a run of PPO sampled, by step and prompt."""
    lines = small.rows(Path(folder) / "samples.jsonl")
    return [(line["step"], line["prompt"], line["response"]) for line in lines]
