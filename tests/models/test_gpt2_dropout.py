"""Dropout in GPT-2: each of its three places, and between layers."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.interface import positions_from
from tests.models.tiny_gpt2 import CONFIG, hidden

RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@pytest.mark.parametrize("name", RATES)
def test_each_dropout_needs_a_key_and_its_own_rate(name, params, texts):
    model = GPT2(dataclasses.replace(CONFIG, **(dict.fromkeys(RATES, 0.0) | {name: 0.5})))
    run = jax.jit(lambda key: model.hidden(params, texts[3][None], dropout_key=key))
    plain = hidden(params, texts[3][None])
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    for a, b in itertools.combinations((plain, first, other), 2):
        assert np.abs(a - b).max() > 1e-2


def test_a_dropout_key_without_rates_changes_nothing(params, texts):
    model = GPT2(dataclasses.replace(CONFIG, **dict.fromkeys(RATES, 0.0)))
    run = jax.jit(lambda key: model.hidden(params, texts[3][None], dropout_key=key))
    states = run(jax.random.key(0))
    np.testing.assert_allclose(states, hidden(params, texts[3][None]), rtol=1e-5, atol=1e-5)


def test_dropout_differs_between_layers():
    # Layers that add ones to nothing: the rest after dropout shows which of them were dropped.
    config = dataclasses.replace(CONFIG, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.5)
    model = GPT2(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    layers = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["layers"])
    layers["mlp"]["c_proj"]["bias"] += jnp.array([[1.0], [4.0]])
    x, mask = jnp.zeros((8, 4, 16)), jnp.ones((8, 4), bool)
    run = jax.jit(lambda key: model.layers(layers, x, mask, positions_from(mask), dropout_key=key))
    out, _ = run(jax.random.key(0))
    counts = collections.Counter(np.asarray(out).ravel().tolist())
    assert set(counts) == {0.0, 2.0, 8.0, 10.0}
    assert min(counts.values()) > 0.15 * out.size
