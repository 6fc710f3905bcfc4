"""One finished run of each stage, which the tests compare with and start from."""

import json
import os

import pytest

from rlhf_jax.runtime import train_ppo, train_reward, train_sft
from tests import small


@pytest.fixture(scope="session")
def compiled():
    """The folder of compiled programs."""
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory):
    """A run of `train_sft`, as (folder, result)."""
    folder = tmp_path_factory.mktemp("sft")
    return folder, train_sft(small.sft(folder))


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory, sft_run):
    """A run of `train_reward` from the model of `sft_run`."""
    folder = tmp_path_factory.mktemp("reward")
    return folder, train_reward(small.reward(folder, sft_run[0]))


@pytest.fixture(scope="session")
def ppo_run(tmp_path_factory, sft_run, reward_run):
    """A run of `train_ppo` from the models of both."""
    folder = tmp_path_factory.mktemp("ppo")
    return folder, train_ppo(small.ppo(folder, sft_run[0], reward_run[0]))


@pytest.fixture
def config_folder(tmp_path):
    """A folder with the configuration of a GPT-2 whose widths divide over sixteen devices."""
    sizes = {"vocab_size": 250, "n_positions": 32, "n_embd": 64, "n_layer": 1, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    return str(tmp_path)
