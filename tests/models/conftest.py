"""Parameters of the tiny GPT-2, texts of its vocabulary, and folders of a small one."""

import numpy as np
import pytest

from rlhf_jax.models.huggingface import save_pretrained, save_reward_model
from tests.models import gpt2_folders
from tests.models.tiny_gpt2 import MODEL, VOCABULARY, busy_params


@pytest.fixture(scope="session")
def params():
    return busy_params(MODEL, norm_scale=1.0)


@pytest.fixture(scope="session")
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, size=n) for n in (5, 1, 3, 7)]


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "saved", gpt2_folders.MODEL, gpt2_folders.PARAMS)
    return tmp_path / "saved"


@pytest.fixture
def reward_folder(tmp_path):
    params = {"model": gpt2_folders.PARAMS, "head": gpt2_folders.HEAD}
    save_reward_model(tmp_path / "reward", gpt2_folders.MODEL, params)
    return tmp_path / "reward"
