"""Eight devices, however they are arranged, train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.models.huggingface import load_pretrained
from rlhf_jax.runtime import train_ppo, train_reward, train_sft
from tests import small

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MESHES = ((8, 1, 1), (2, 2, 2), (1, 8, 1))
STAGES = ("sft", "reward", "ppo")
# Sums in another order differ in their last bits, which Adam's early steps, of nearly the sign of
# the gradient, enlarge.
ABSOLUTE = 1e-5


def mesh_name(sizes):
    return "x".join(map(str, sizes))


def make_configs(folder, one_device, sizes):
    """The three stages on a mesh, each from what the stages on one device left."""
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    # Nothing is held out: what PPO samples to learn from is sample enough, and compiled anyway.
    logging = {"eval_every": 0, "samples_every": 1, "num_samples": 8, "progress": False}
    shared = {"mesh": mesh, "logging": logging, "data": {"eval_rows": 0}}
    sft, rewarded = one_device / "sft", one_device / "reward"
    normalized = {"normalize_before": True, "normalize_after": True}
    texts = {"builtin_rows": 32, "eval_rows": 0, "max_length": 16}
    return {
        "sft": small.sft(folder / "sft", **shared),
        "reward": small.reward(folder / "reward", sft, **shared, reward=normalized),
        "ppo": small.ppo(folder / "ppo", sft, rewarded, **shared, ppo={"ptx_coef": 0.5}, ptx=texts),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with the runs on one device in `1x1x1/` and on eight in the others."""
    small.use_cache(small.cache_folder(tmp_path_factory))
    base = tmp_path_factory.mktemp("meshes")
    one = base / mesh_name((1, 1, 1))
    configs = make_configs(one, one, (1, 1, 1))
    for name, train in zip(STAGES, (train_sft, train_reward, train_ppo), strict=True):
        train(configs[name])
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.eight_devices", str(base), str(one)],
        cwd=ROOT,
        # Programs for eight devices take long to compile; how fast they run is of no matter here.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return base, done.stdout.splitlines()


@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
@pytest.mark.parametrize("stage", STAGES)
def test_metrics_are_those_of_one_device(runs, stage, sizes):
    one, eight = (
        small.rows(runs[0] / mesh_name(mesh) / stage / "metrics.jsonl")
        for mesh in ((1, 1, 1), sizes)
    )
    assert len(one) == len(eight) == small.STEPS
    for expected, actual in zip(one, eight, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(
                actual[name], value, rtol=1e-5, atol=ABSOLUTE, err_msg=f"{expected['step']} {name}"
            )


@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
def test_the_same_tokens_are_sampled(runs, sizes):
    def texts(mesh):
        rows = small.rows(runs[0] / mesh_name(mesh) / "ppo" / "samples.jsonl")
        return [(row["step"], row["prompt"], row["response"]) for row in rows]

    assert texts(sizes) == texts((1, 1, 1))
    assert len(texts(sizes)) == 8 * small.STEPS


@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
def test_the_exported_model_is_whole(runs, sizes):
    model, params = load_pretrained(runs[0] / mesh_name(sizes) / "ppo" / "hf")
    _, expected = load_pretrained(runs[0] / mesh_name((1, 1, 1)) / "ppo" / "hf")
    assert params["wte"]["embedding"].shape == expected["wte"]["embedding"].shape
    scale = params["ln_f"]["scale"], expected["ln_f"]["scale"]
    np.testing.assert_allclose(*scale, rtol=1e-3)


def test_sizes_that_do_not_divide_are_named(runs):
    width, batch, devices = runs[1][-3:]
    assert "is not divisible by mesh.tensor = 8; choose a tensor that divides it." in width
    assert batch == "sft.batch_size = 12 is not divisible by mesh data x fsdp = 8 devices."
    assert devices.startswith("mesh data x fsdp x tensor = 3 x 1 x 1 does not fit 8 devices")
