"""A tiny model with sharp preferences, for all train steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.gpt2 import GPT2, GPT2Config


def busy_params(model, seed):
    """Parameters in which everything matters: biases, scales and sharp attention included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)
    table = params["wte"]["embedding"]
    params["wte"]["embedding"] = table.at[model.config.vocab_size :].set(0.0)
    return params


@pytest.fixture(scope="session")
def model():
    return GPT2(GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2))


@pytest.fixture(scope="session")
def reward_model(model):
    """Of another form than the policy, as far as the tokens allow."""
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
    return {"model": busy_params(reward_model, 2), "head": {"kernel": jnp.asarray(kernel)}}
