"""Eight devices, however they are arranged, train as one does."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.huggingface import load_pretrained, load_reward_model
from rlhf_jax.runtime import train
from tests.parallel.meshes import (
    SAMPLING,
    STEPS,
    differences,
    make_configs,
    mesh_name,
    run_folder,
    sampled,
    trainer_of,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ONE = (1, 1, 1)
# tools/check_meshes.py trains all stages on all factorisations. Here are those that differ in what
# is split, on all axes at once, and one stage on fsdp alone.
PLAN = (
    ("gpt2", (1, 8, 1), ("sft",)),
    ("gpt2", (2, 2, 2), ("ppo",)),
    ("qwen3", (2, 2, 2), ("reward", "frozen", "dpo", "online_dpo", "grpo")),
)
# The decoder's run on the newest end of the versions alone: a version of JAX that partitions these
# programs in another way does so with GPT-2's as well.
RUNS = [
    pytest.param(family, sizes, stage, marks=[pytest.mark.newest] if family != "gpt2" else [])
    for family, sizes, stages in PLAN
    for stage in stages
]
SAMPLED = [run for run in RUNS if run.values[2] in SAMPLING]


def name_of(value):
    return mesh_name(value) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By family: the folder with its runs on one device and on eight, and the latter's output."""
    return functools.cache(functools.partial(run_family, tmp_path_factory.mktemp("meshes")))


def run_family(base, family):
    plan = [line for line in PLAN if line[0] == family]
    needed = {"sft", "reward"}.union(*(stages for _, _, stages in plan))
    for name, config in make_configs(base, family, ONE).items():
        if name in needed:  # all stages start from the first two
            train(trainer_of(name), config)
    done = subprocess.run(
        [*(sys.executable, "-m", "tests.parallel.eight_devices", str(base)), json.dumps(plan)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return base, done.stdout.splitlines()


def both(runs, family, sizes, stage):
    """The folders of a run on one device and on eight."""
    return [run_folder(runs(family)[0], family, mesh) / stage for mesh in (ONE, sizes)]


@pytest.mark.parametrize(("family", "sizes", "stage"), RUNS, ids=name_of)
def test_metrics_are_those_of_one_device(runs, family, sizes, stage):
    shares = differences(*both(runs, family, sizes, stage))
    assert {name: share for name, share in shares.items() if share > 1} == {}


@pytest.mark.parametrize(("family", "sizes", "stage"), SAMPLED, ids=name_of)
def test_the_same_tokens_are_sampled(runs, family, sizes, stage):
    one, several = map(sampled, both(runs, family, sizes, stage))
    assert one == several
    shown = 6 if stage in ("online_dpo", "grpo") else 8  # all three responses to a prompt, or one
    assert len([sample for sample in several if sample[0] > 0]) == shown * STEPS


@pytest.mark.parametrize(("family", "sizes", "stage"), RUNS, ids=name_of)
def test_the_exported_model_is_full(runs, family, sizes, stage):
    load = load_reward_model if stage == "reward" else load_pretrained
    trees = [load(folder / "hf")[1] for folder in both(runs, family, sizes, stage)]
    expected, params = (tree.get("model", tree) for tree in trees)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    norm = "ln_f" if family == "gpt2" else "norm"
    np.testing.assert_allclose(params[norm]["scale"], expected[norm]["scale"], rtol=1e-3)


def test_sizes_that_do_not_divide_are_named(runs):
    own, heads, width, batch, devices = runs("gpt2")[1][-5:]
    assert own == (
        "The model has num_key_value_heads = 4 heads of attention, which are not divisible by "
        "mesh.tensor = 8; choose a tensor that divides them, or use fsdp instead."
    )
    assert heads == (
        "The model has n_head = 4 heads of attention, which are not divisible by mesh.tensor = 8; "
        "choose a tensor that divides them, or use fsdp instead."
    )
    assert "of which 36 is not divisible by mesh.fsdp = 8; choose a fsdp that divides it." in width
    assert batch == "sft.batch_size = 12 is not divisible by mesh data x fsdp = 8 devices."
    assert devices.startswith("mesh data x fsdp x tensor = 3 x 1 x 1 does not fit 8 devices")
