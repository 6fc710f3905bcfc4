"""PPO's settings: what follows from them, their defaults, and what is refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.training import ppo
from rlhf_jax.training.state import make_optimizer
from tests.training.ppo_by_loop import (
    EOS,
    KEY,
    SCORES,
    SETTINGS,
    SGD,
    update_with,
)


def test_a_fresh_state_refers_to_a_copy(model, params):
    state = ppo.init_state(model, params, SETTINGS, KEY)
    jax.tree.map(np.testing.assert_array_equal, state.frozen["ref"], params)
    for ours, theirs in zip(
        jax.tree.leaves(state.frozen["ref"]), jax.tree.leaves(params), strict=True
    ):
        assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
    assert set(state.frozen) == {"ref"}
    assert float(state.kl_coef) == pytest.approx(0.3)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.params["value_head"]))


def test_without_an_optimizer_it_is_adam_with_the_published_epsilon(model, params):
    assert ppo.TRAINER.optimizer.eps == 1e-5
    state = ppo.init_state(model, params, SETTINGS, KEY)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-5), state.params)
    ours = make_optimizer(ppo.TRAINER.optimizer)
    updates, _ = ours.update(grads, state.opt_state, state.params)
    # Below the clipping, g / (|g| + eps) is one half.
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.5e-5 * g / g, grads), rtol=1e-3)


def test_the_counts_follow_from_the_settings():
    settings = ppo.Settings(total_episodes=100, batch_size=32, num_ppo_epochs=3, num_mini_batches=2)
    assert (settings.total_iterations, settings.num_updates) == (4, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_mini_batches": 3}, "ppo.batch_size = 128 is not divisible by ppo.num_mini_batches"),
        ({"temperature": 0.0}, "ppo.temperature must be above 0"),
        ({"response_length": 0}, "ppo.response_length must be above 0"),
        ({"min_response_length": 33}, "from 1 to ppo.response_length = 32, but is 33"),
        ({"min_response_length": 0}, "from 1 to ppo.response_length = 32, but is 0"),
        ({"kl_estimator": "k4"}, "ppo.kl_estimator must be k1, k2 or k3, but is 'k4'"),
    ],
    ids=str,
)
def test_settings_out_of_range_say_what_is_allowed(change, message):
    with pytest.raises(InputError, match=message):
        ppo.Settings(**change)


def test_a_batch_of_another_size_is_refused(model, state, batch, rollout):
    settings = dataclasses.replace(SETTINGS, batch_size=8)
    with pytest.raises(ValueError, match="4 prompts, but ppo.batch_size is 8"):
        update_with(model, settings)(state, batch, rollout, SCORES, KEY)


def test_a_state_without_a_reward_model_is_refused(model, params, batch):
    state = ppo.init_state(model, params, SETTINGS, KEY, optimizer=SGD)
    step = ppo.make_step(model, SETTINGS, optimizer=SGD, stop_token_ids=(EOS,))
    with pytest.raises(ValueError, match="holds no reward model: give reward_params"):
        jax.eval_shape(step, state, batch, KEY)
