"""The one recipe: shardings of arguments and results, donation, and compiler options."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.runtime import program

RULES = (("kernel", PartitionSpec("fsdp", "tensor")),)
BATCH = np.arange(16, dtype=np.float32).reshape(8, 2)
KEY = jax.random.key(0)


class State(NamedTuple):
    step: jax.Array
    kernel: jax.Array


def init(kernel):
    return State(jnp.zeros((), jnp.int32), 2.0 * kernel)


@pytest.fixture
def place():
    return program.Placement(make_mesh(MeshSettings(1, 1, 1)), RULES)


@pytest.fixture
def state(place):
    return place.initialise(init, np.ones((2, 4), np.float32))


def spec(array):
    return array.sharding.spec


def test_a_state_is_initialised_sharded(state):
    assert spec(state.kernel) == PartitionSpec("fsdp", "tensor")
    assert spec(state.step) == PartitionSpec()
    np.testing.assert_array_equal(state.kernel, np.full((2, 4), 2.0))


def test_a_step_donates_the_state_and_replicates_the_metrics(place, state):
    def step(state, batch, key):
        del key
        total = batch.sum() + state.kernel.sum()
        return State(state.step + 1, state.kernel + 1.0), {"total": total}, batch

    compiled = place.step(step, jax.eval_shape(init, state.kernel), returns_batch=True)
    new, metrics, rollout = compiled(state, BATCH, KEY)
    assert state.kernel.is_deleted()
    assert int(new.step) == 1
    assert spec(new.kernel) == PartitionSpec("fsdp", "tensor")
    assert metrics["total"].sharding.is_fully_replicated
    assert float(metrics["total"]) == BATCH.sum() + 16.0
    assert spec(rollout) == PartitionSpec(("data", "fsdp"))


def test_the_rollout_keeps_the_state_and_the_update_donates_it(place, state):
    def sample(state, batch, key):
        return batch + state.kernel[0, 0] + jax.random.uniform(key)

    def update(state, batch, rollout, scores, key):
        del key
        return state._replace(step=state.step + 1), {"score": scores.mean()}, rollout - batch

    rollout = place.rollout(sample, state)(state, BATCH, KEY)
    assert spec(rollout) == PartitionSpec(("data", "fsdp"))
    assert not state.kernel.is_deleted()
    scores = np.ones(8, np.float32)
    new, metrics, _ = place.update(update, state)(state, BATCH, rollout, scores, KEY)
    assert state.kernel.is_deleted()
    assert int(new.step) == 1
    assert float(metrics["score"]) == 1.0


def test_an_evaluation_is_replicated_and_keeps_the_parameters(place, state):
    def evaluate(params, batch):
        return {"total": (batch @ params["kernel"]).sum()}

    params = {"kernel": state.kernel}
    metrics = place.evaluation(evaluate, params)(params, place.put(BATCH))
    assert metrics["total"].sharding.is_fully_replicated
    assert float(metrics["total"]) == 4 * 2.0 * BATCH.sum()
    assert not state.kernel.is_deleted()


def test_steps_that_change_a_state_have_the_options_of_the_platform(place, state, monkeypatch):
    monkeypatch.setattr(program, "compiler_options", lambda platform: {f"no_{platform}": "1"})
    step = place.step(lambda state, batch, key: (state, {}), state)
    with pytest.raises(Exception, match="no_cpu"):
        step.lower(state, BATCH, KEY).compile()
