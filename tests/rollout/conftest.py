"""A tiny model with sharp preferences, and ragged prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.gpt2 import GPT2, GPT2Config


@pytest.fixture(scope="session")
def model():
    return GPT2(GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2))


@pytest.fixture(scope="session")
def params(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), shapes)
    table = params["wte"]["embedding"]
    params["wte"]["embedding"] = table.at[model.config.vocab_size :].set(0.0)
    return params


@pytest.fixture(scope="session")
def prompts():
    """(tokens i32[4, 5], mask bool[4, 5]): left-padded with ids that mean nothing."""
    rng = np.random.default_rng(1)
    lengths = (5, 1, 3, 4)
    mask = np.array([[t >= 5 - length for t in range(5)] for length in lengths])
    tokens = np.where(mask, rng.integers(0, 11, size=mask.shape), 7).astype(np.int32)
    return tokens, mask
