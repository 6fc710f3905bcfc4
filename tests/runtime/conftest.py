"""One finished run of each stage, which the tests compare with and start from."""

import pytest

from rlhf_jax.runtime import train_ppo, train_reward, train_sft
from tests import small


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    folder = small.cache_folder(tmp_path_factory)
    small.use_cache(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Other tests compile as users do, among them one of all stages: tests/test_end_to_end.py."""
    with small.few_optimizations():
        yield


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory):
    """A run of `train_sft`, as (folder, result)."""
    folder = tmp_path_factory.mktemp("sft")
    with small.few_optimizations():
        return folder, train_sft(small.sft(folder))


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory, sft_run):
    """A run of `train_reward` from the model of `sft_run`."""
    folder = tmp_path_factory.mktemp("reward")
    with small.few_optimizations():
        return folder, train_reward(small.reward(folder, sft_run[0]))


@pytest.fixture(scope="session")
def ppo_run(tmp_path_factory, sft_run, reward_run):
    """A run of `train_ppo` from the models of both."""
    folder = tmp_path_factory.mktemp("ppo")
    with small.few_optimizations():
        return folder, train_ppo(small.ppo(folder, sft_run[0], reward_run[0]))
