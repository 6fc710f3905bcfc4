"""The stages on eight CPU devices, for several meshes; checks where their states stand.

Started by test_stages.py and by tools/check_meshes.py, in a process of its own: the number of
devices is fixed at start.
"""

import os

if __name__ == "__main__":  # and not when it is looked through for doctests
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import json
import sys
from pathlib import Path

import jax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.partition import partition_spec
from rlhf_jax.runtime import train_sft
from rlhf_jax.runtime.config import (
    PPOConfig,
    RewardConfig,
    SFTConfig,
    config_of,
    resolve,
    trainer_named,
)
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages.groups import GroupStage
from rlhf_jax.runtime.stages.offline import PolicyStage, RewardModelStage
from rlhf_jax.runtime.stages.online import OnlineStage
from rlhf_jax.runtime.stages.sampled import SampledStage
from tests import small
from tests.parallel.meshes import make_configs, model_of

KINDS = {
    "sft": (SFTConfig, PolicyStage),
    "reward": (RewardConfig, RewardModelStage),
    "dpo": (config_of(trainer_named("dpo")), PolicyStage),
    "kto": (config_of(trainer_named("kto")), PolicyStage),
    "online_dpo": (config_of(trainer_named("online_dpo")), OnlineStage),
    "rft": (config_of(trainer_named("rft")), SampledStage),
    "grpo": (config_of(trainer_named("grpo")), GroupStage),
    **dict.fromkeys(("ppo", "frozen", "trunk"), (PPOConfig, OnlineStage)),
}


def assert_in_place(stage, state):
    """Each array is split as the rules say, and no device holds more than its part."""
    mesh, rules = stage.mesh, stage.model.partition_rules
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition_spec(name, leaf.ndim, rules)
        parts = [mesh.shape[axis] if axis else 1 for axis in spec]
        parts += [1] * (leaf.ndim - len(parts))
        part = tuple(size // n for size, n in zip(leaf.shape, parts, strict=True))
        assert {shard.data.shape for shard in leaf.addressable_shards} == {part}, name


def checked(stage_class):
    """The stage, with its state checked when it is made and after every step."""

    class Checked(stage_class):
        def init_state(self):
            state = super().init_state()
            assert_in_place(self, state)
            return state

        def step(self, state, index):
            state, metrics, output = super().step(state, index)
            assert_in_place(self, state)
            return state, metrics, output

    return Checked


def main(base, plan):
    """Runs a plan, a JSON list of [family, mesh, stages], beside the runs on one device."""
    for family, sizes, stages in json.loads(plan):
        configs = make_configs(base, family, sizes)
        for name in stages:
            kind, stage = KINDS[name]
            config = resolve(kind, configs[name])
            loop.run(lambda stage=stage, config=config: checked(stage)(config), config)
    for values in (
        {"mesh": {"data": 1, "fsdp": 1, "tensor": 8}, "model": model_of("qwen3", base)},
        {"mesh": {"data": 1, "fsdp": 1, "tensor": 8}, "model": {"n_embd": 36, "n_head": 4}},
        {"mesh": {"data": 1, "fsdp": 8}, "model": {"n_embd": 36, "n_head": 4}},
        {"mesh": {"data": 8}, "sft": {"batch_size": 12}},
        {"mesh": {"data": 3}},
    ):
        with pytest.raises(InputError) as error:
            train_sft(small.sft(Path(base) / "wrong", **values))
        sys.stdout.write(f"{error.value}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
