"""Reward models with frozen lower layers: the step of the full model, held still below."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import RankingBatch
from rlhf_jax.errors import InputError
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.training import reward
from tests.training.scans import scans
from tests.training.test_reward import PAIRS, batch_of

SGD = optax.sgd(0.1, momentum=0.9)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def scorer(params):
    kernel = np.random.default_rng(3).normal(size=16)
    return {"model": params, "head": {"kernel": jnp.asarray(kernel, jnp.float32)}}


def batch_for(objective):
    pairs = batch_of(PAIRS, 4)
    if objective != "ranking":
        return pairs
    return RankingBatch(*reward.sequences_of(pairs))


@pytest.mark.newest
def test_a_step_is_that_of_the_full_model_with_frozen_lower_layers(model, scorer):
    unfrozen, batch = 1, batch_of(PAIRS, 4)
    plain = reward.Settings(objective="tokenwise", batch_size=4)
    settings = dataclasses.replace(plain, num_layers_unfrozen=unfrozen)
    start = reward.init_state(model, scorer, settings, KEY, optimizer=SGD)
    after, metrics = jax.jit(reward.make_step(model, settings, optimizer=SGD))(start, batch, KEY)
    full = reward.init_state(model, scorer, plain, KEY, optimizer=SGD)
    expected, others = jax.jit(reward.make_step(model, plain, optimizer=SGD))(full, batch, KEY)
    lower, upper = model.split(expected.params["model"], unfrozen)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        after.params,
        {**expected.params, "model": upper},
    )
    for name in set(others) - {"train/grad_norm"}:
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5, err_msg=name)
    assert float(metrics["train/grad_norm"]) < float(others["train/grad_norm"])
    # What is frozen stays, has no momentum, and would have moved.
    before = model.split(scorer["model"], unfrozen)[0]
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before)
    momentum = jax.tree.map(jnp.shape, after.opt_state[0].trace)
    assert momentum == jax.tree.map(jnp.shape, after.params)
    assert jnp.abs(lower["wte"]["embedding"] - before["wte"]["embedding"]).max() > 0
    merged = reward.full_params(model, after)
    jax.tree.map(np.testing.assert_array_equal, model.split(merged["model"], unfrozen)[0], before)


@pytest.mark.newest
def test_end_scores_are_those_of_the_full_model(model, scorer):
    """Also with nothing below the upper half but the embeddings, and with nothing in it."""
    sequences = reward.sequences_of(batch_of(PAIRS, 4))
    scores = jax.jit(end_scores, static_argnums=0)
    expected = scores(model, scorer, sequences)
    for unfrozen in (0, 2):
        lower, upper = model.split(scorer["model"], unfrozen)
        halves = scores(model, {**scorer, "model": upper}, sequences, frozen=lower)
        np.testing.assert_allclose(halves, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.newest
@pytest.mark.parametrize("objective", ["last_token", "tokenwise", "ranking"])
def test_nothing_goes_back_through_the_frozen_layers(model, objective):
    """Prompts and responses are run through both halves, and only the upper one twice."""
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, n_layer=9))
    settings = reward.Settings(objective=objective, batch_size=4, num_layers_unfrozen=2)

    def init(params):
        return reward.init_state(model, params, settings, KEY, optimizer=SGD)

    state = jax.eval_shape(init, jax.eval_shape(model.init, KEY))
    step = reward.make_step(model, settings, optimizer=SGD)
    actual = scans(jax.make_jaxpr(step)(state, batch_for(objective), KEY).jaxpr)
    lengths = [length for length, _ in actual]
    assert (lengths.count(7), lengths.count(2), lengths.count(9)) == (1, 2, 0)


def test_more_layers_than_there_are_or_less_than_none_are_refused(model, scorer):
    settings = reward.Settings(num_layers_unfrozen=3)
    message = "reward.num_layers_unfrozen must be from 0 to the model's n_layer = 2, but is 3"
    with pytest.raises(InputError, match=message):
        reward.init_state(model, scorer, settings, KEY)
    with pytest.raises(InputError, match="reward.num_layers_unfrozen must not be negative"):
        reward.Settings(num_layers_unfrozen=-1)
