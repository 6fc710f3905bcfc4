"""A tiny model with sharp preferences, for all train steps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.training import ppo
from tests.models.tiny_gpt2 import MODEL, busy_params
from tests.training.ppo_by_loop import EOS, KEY, SETTINGS, SGD


@pytest.fixture(scope="session")
def model():
    return MODEL


@pytest.fixture(scope="session")
def reward_model(model):
    """Of another architecture than the policy, as far as the tokens allow."""
    return GPT2(dataclasses.replace(model.config, n_layer=1, n_embd=8))


@pytest.fixture(scope="session")
def params(model):
    return busy_params(model, 0)


@pytest.fixture(scope="session")
def ref_params(model):
    return busy_params(model, 1)


@pytest.fixture(scope="session")
def reward_params(reward_model):
    kernel = np.random.default_rng(3).normal(size=8).astype(np.float32)
    return {
        "model": busy_params(reward_model, 2),
        "head": {"kernel": jnp.asarray(kernel)},
    }


@pytest.fixture(scope="module")
def batch():
    lengths = (4, 1, 3, 2)
    mask = np.array([[t >= 4 - length for t in range(4)] for length in lengths])
    tokens = np.where(mask, np.random.default_rng(4).integers(0, 10, mask.shape), 6)
    return PromptBatch(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.arange(4))


@pytest.fixture(scope="module")
def rollout():
    """Responses that were not sampled: three end with EOS, the last does not."""
    rng, lengths = np.random.default_rng(5), np.array([3, 1, 5, 5])
    mask = np.arange(5) < lengths[:, None]
    tokens = np.where(mask, rng.integers(0, 10, size=mask.shape), 0)
    tokens[[0, 1, 2], lengths[:3] - 1] = EOS
    return Rollout(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.zeros((4, 5)))


@pytest.fixture(scope="module")
def state(model, params, ref_params, reward_params):
    state = ppo.init_state(
        model,
        params,
        SETTINGS,
        KEY,
        optimizer=SGD,
        ref_params=ref_params,
        reward_params=reward_params,
    )
    kernel = np.random.default_rng(8).normal(size=16) * 0.2
    head = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.float32(0.3)}
    return state._replace(params={**state.params, "value_head": head})
