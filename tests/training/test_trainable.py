"""Trained and frozen parameters: a supervised step beside a frozen part of the model."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.training import sft, trainable
from rlhf_jax.training.state import init_train_state
from rlhf_jax.training.trainable import Trainable
from tests.training.test_sft import KEY, SETTINGS, SGD, TEXTS, batch_of


def test_a_supervised_step_updates_the_trained_part_alone(model, params):
    batch = batch_of([[TEXTS[0], TEXTS[1]], [TEXTS[2]], [TEXTS[3]]], 8)
    parts = trainable.split(model, params, 1, "sft")
    step = jax.jit(sft.make_step(model, SETTINGS, optimizer=SGD))
    after, metrics = step(init_train_state(parts.trained, SGD, parts.frozen), batch, KEY)
    full, others = step(sft.init_state(model, params, SETTINGS, KEY, optimizer=SGD), batch, KEY)
    expected = model.split(full.params, 1)[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after.params, expected
    )
    for name in ("train/loss", "train/accuracy", "perf/tokens"):
        assert float(metrics[name]) == pytest.approx(float(others[name]), rel=1e-5)
    assert float(metrics["train/grad_norm"]) < float(others["train/grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after.frozen, parts.frozen)
    merged = sft.full_params(model, after)
    jax.tree.map(np.testing.assert_array_equal, merged, model.merge(parts.frozen, after.params))


def test_dropout_reaches_both_parts(model, params):
    config = dataclasses.replace(model.config, resid_pdrop=0.5, embd_pdrop=0.5)
    dropping, batch = GPT2(config), batch_of([[TEXTS[0]], [TEXTS[2]]], 8)
    parts = trainable.split(model, params, 1, "sft")
    hidden = jax.jit(
        lambda *parts, key=None: trainable.text_hidden(
            dropping, Trainable(*parts), batch.tokens, batch.segments, dropout_key=key
        )
    )
    plain = hidden(*parts)
    np.testing.assert_allclose(plain, hidden(params), rtol=1e-4, atol=1e-4)
    assert np.abs(plain - hidden(*parts, key=KEY)).max() > 0.1


def test_everything_is_trained_by_default(model, params):
    parts = trainable.split(model, params, None, "sft")
    assert parts == (params, None)
    assert trainable.full_params(model, parts) is params
    state = sft.init_state(model, params, SETTINGS, KEY, optimizer=optax.sgd(1.0))
    assert state.frozen is None
