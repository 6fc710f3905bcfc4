"""Eight devices, however they are arranged, train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.models.huggingface import load_pretrained, load_reward_model
from rlhf_jax.runtime import train_ppo, train_reward, train_sft
from tests.parallel.meshes import STEPS, differences, make_configs, mesh_name, sampled

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ONE = (1, 1, 1)
# tools/check_meshes.py trains all stages on all factorisations.
# Here each stage where all axes are split, and each axis alone with one stage.
STAGES = ("sft", "reward", "ppo", "frozen")
PLAN = {(8, 1, 1): ("ppo",), (1, 8, 1): ("sft",), (1, 2, 4): ("reward",), (2, 2, 2): STAGES}
RUNS = [(sizes, stage) for sizes, stages in PLAN.items() for stage in stages]
SAMPLED = [(sizes, stage) for sizes, stage in RUNS if stage not in ("sft", "reward")]


def name_of(value):
    return mesh_name(value) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with the runs on one device in `1x1x1/` and on eight in the others."""
    base = tmp_path_factory.mktemp("meshes")
    trains = {"sft": train_sft, "reward": train_reward}
    configs = make_configs(base / mesh_name(ONE), base / mesh_name(ONE), ONE)
    for name in STAGES:
        trains.get(name, train_ppo)(configs[name])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.parallel.eight_devices", str(base)),
            json.dumps(list(PLAN.items())),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return base, done.stdout.splitlines()


@pytest.mark.parametrize(("sizes", "stage"), RUNS, ids=name_of)
def test_metrics_are_those_of_one_device(runs, sizes, stage):
    found = differences(runs[0] / mesh_name(ONE) / stage, runs[0] / mesh_name(sizes) / stage)
    assert {name: share for name, share in found.items() if share > 1} == {}


@pytest.mark.parametrize(("sizes", "stage"), SAMPLED, ids=name_of)
def test_the_same_tokens_are_sampled(runs, sizes, stage):
    one, several = (sampled(runs[0] / mesh_name(mesh) / stage) for mesh in (ONE, sizes))
    assert one == several
    assert len([sample for sample in several if sample[0] > 0]) == 8 * STEPS


@pytest.mark.parametrize(("sizes", "stage"), RUNS, ids=name_of)
def test_the_exported_model_is_full(runs, sizes, stage):
    load = load_reward_model if stage == "reward" else load_pretrained
    trees = (load(runs[0] / mesh_name(mesh) / stage / "hf")[1] for mesh in (sizes, ONE))
    params, expected = (tree.get("model", tree) for tree in trees)
    assert params["wte"]["embedding"].shape == expected["wte"]["embedding"].shape
    scale = params["ln_f"]["scale"], expected["ln_f"]["scale"]
    np.testing.assert_allclose(*scale, rtol=1e-3)


def test_sizes_that_do_not_divide_are_named(runs):
    heads, width, batch, devices = runs[1][-4:]
    assert heads == (
        "The model has n_head = 4 heads of attention, which are not divisible by mesh.tensor = 8; "
        "choose a tensor that divides them, or use fsdp instead."
    )
    assert "of which 36 is not divisible by mesh.fsdp = 8; choose a fsdp that divides it." in width
    assert batch == "sft.batch_size = 12 is not divisible by mesh data x fsdp = 8 devices."
    assert devices.startswith("mesh data x fsdp x tensor = 3 x 1 x 1 does not fit 8 devices")
