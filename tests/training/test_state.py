"""The optimizer: schedules, what decays, and clipping."""

import functools
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import LoraSettings
from rlhf_jax.models.adapter_folders import with_settings
from rlhf_jax.models.adapters import fresh_params, merged_trees, plain_params, split_adapters
from rlhf_jax.parallel.partition import path_name
from rlhf_jax.training import OptimizerSettings, make_optimizer
from rlhf_jax.training.epochs import apply_gradients
from rlhf_jax.training.state import init_train_state, learning_rate_schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0, 0.25, 0.5, 0.75, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
    ],
)
def test_a_warmup_rises_and_a_decay_ends_at_zero(schedule, expected):
    settings = OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup_steps=4)
    rates = [float(learning_rate_schedule(settings, 8)(update)) for update in range(9)]
    np.testing.assert_allclose(rates, 2.0 * np.array(expected), rtol=1e-5, atol=1e-6)
    if schedule == "cosine":
        published = optax.warmup_cosine_decay_schedule(0.0, 2.0, 4, 8)
        np.testing.assert_allclose(rates, [published(update) for update in range(9)], rtol=1e-6)


@pytest.mark.parametrize(("schedule", "end"), [("constant", 3.0), ("linear", 0.0), ("cosine", 0.0)])
def test_without_a_warmup_the_first_update_has_the_full_rate(schedule, end):
    rate = learning_rate_schedule(OptimizerSettings(learning_rate=3.0, schedule=schedule), 10)
    assert float(rate(0)) == 3.0
    assert float(rate(5)) == pytest.approx((3.0 + end) / 2)
    assert float(rate(10)) == pytest.approx(end, abs=1e-6)
    assert float(rate(100)) == pytest.approx(end, abs=1e-6)


def test_a_warmup_of_one_update_or_longer_than_the_run_stays_in_range():
    one = learning_rate_schedule(OptimizerSettings(learning_rate=1.0, warmup_steps=1), 4)
    assert [float(one(update)) for update in range(3)] == [0.0, 1.0, 1.0]
    settings = OptimizerSettings(learning_rate=1.0, schedule="linear", warmup_steps=10)
    rates = [float(learning_rate_schedule(settings, 4)(update)) for update in range(4)]
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3], rtol=1e-5)


def decayed(params, models=()):
    """Paths of the parameters that an update without gradients changes, all by the decay."""
    settings = OptimizerSettings(learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(settings, models=models)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), params)
    grads = jax.tree.map(jnp.zeros_like, params)
    apply = jax.jit(functools.partial(apply_gradients, optimizer))
    after, _, _ = apply(params, optimizer.init(params), grads)
    leaves = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(after)}
    paths = {path for path, x in leaves.items() if np.all(x < 1)}
    for path in paths:
        np.testing.assert_allclose(leaves[path], 0.95, err_msg=path)
    return leaves.keys(), paths


def test_all_but_biases_and_norms_decay(model):
    model = with_settings(model, LoraSettings(r=2, use_dora=True))
    shapes = jax.eval_shape(functools.partial(fresh_params, model), jax.random.key(0))
    trained, _ = split_adapters(model.adapters, shapes)
    head = {"kernel": jnp.ones(16), "bias": jnp.ones(())}
    own = merged_trees(plain_params(shapes), trained)
    leaves, paths = decayed({"model": own, "head": head, "value_head": head}, [model])
    names = ("kernel", "embedding", "lora_a", "lora_b")  # but no lora_magnitude
    assert paths == {path for path in leaves if path.endswith(names)}
    assert {"head/kernel", "value_head/kernel", "model/wte/embedding"} < paths


def test_without_no_weight_decay_arrays_of_one_axis_do_not_decay(model):
    """Whatever their names; the axis of stacked layers is not counted, one layer has none."""
    params = {
        "tokens": jnp.ones((5, 3)),
        "gain": jnp.ones(3),
        "layers": {"w": jnp.ones((2, 3, 3)), "norm": {"w": jnp.ones((2, 3))}},
        "tower": {"layers": [{"w": jnp.ones((3, 3)), "b": jnp.ones(3)}]},
        "head": {"kernel": jnp.ones(3)},
    }
    expected = {"tokens", "layers/w", "tower/layers/0/w", "head/kernel"}
    other = types.SimpleNamespace()
    for models in ((), [other], [other, model]):
        assert decayed(params, models)[1] == expected
    says = types.SimpleNamespace(no_weight_decay=("norm/w", "tokens"))
    changed = decayed(params, [says])[1]
    assert changed == set(decayed(params)[0]) - {"tokens", "layers/norm/w"}


class Dense(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def test_parameters_may_be_any_pytree():
    params = [Dense(jnp.ones((2, 2)), jnp.ones((2,))), (jnp.ones((2, 2)),)]
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.5, weight_decay=0.1))
    grads = jax.tree.map(jnp.zeros_like, params)
    after, _, _ = apply_gradients(optimizer, params, optimizer.init(params), grads)
    np.testing.assert_allclose(after[0].kernel, 0.95)
    np.testing.assert_allclose(after[0].bias, 1.0)
    np.testing.assert_allclose(after[1][0], 0.95)


def adam_by_loop(gradients, settings):
    """The sum of the updates of one number (Kingma and Ba 2015, algorithm 1)."""
    m = v = total = 0.0
    for t, g in enumerate(gradients, start=1):
        m = settings.b1 * m + (1 - settings.b1) * g
        v = settings.b2 * v + (1 - settings.b2) * g * g
        root = np.sqrt(v / (1 - settings.b2**t))
        total -= settings.learning_rate * (m / (1 - settings.b1**t)) / (root + settings.eps)
    return total


def test_updates_are_those_of_adam_with_clipped_gradients():
    settings = OptimizerSettings(
        learning_rate=0.1, b1=0.8, b2=0.95, eps=0.3, max_grad_norm=1.0, weight_decay=0.0
    )
    optimizer, params = make_optimizer(settings), {"bias": jnp.zeros(2)}
    state = optimizer.init(params)
    # Norms of 5 and 0.5: the first is scaled down to 1, the second is left alone.
    gradients = np.array([[3.0, 4.0], [0.3, 0.4]])
    for gradient, norm in zip(gradients, (5.0, 0.5), strict=True):
        grads = {"bias": jnp.asarray(gradient, jnp.float32)}
        params, state, reported = apply_gradients(optimizer, params, state, grads)
        assert float(reported) == pytest.approx(norm)
    clipped = gradients / np.array([[5.0], [1.0]])
    expected = [adam_by_loop(clipped[:, i], settings) for i in range(2)]
    np.testing.assert_allclose(params["bias"], expected, rtol=1e-5)


def test_gradients_may_be_left_unclipped():
    settings = OptimizerSettings(learning_rate=0.1, eps=1.0, max_grad_norm=None)
    optimizer, params = make_optimizer(settings), {"bias": jnp.zeros(1)}
    grads = {"bias": jnp.array([50.0])}
    params, _, _ = apply_gradients(optimizer, params, optimizer.init(params), grads)
    np.testing.assert_allclose(params["bias"], adam_by_loop([50.0], settings), rtol=1e-5)


def test_a_state_starts_at_step_zero():
    params = {"bias": jnp.ones(2)}
    state = init_train_state(params, optax.sgd(0.1))
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)
    assert state.params is params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must not be negative, but is -1.0"),
        (
            {"learning_rate": math.nan},
            "optimizer.learning_rate must be a finite number, but is nan",
        ),
        ({"eps": None}, "optimizer.eps must have a value, but is null"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"b1": 1.0}, "b1 must be at least 0 and below 1, but is 1.0"),
        ({"schedule": "step"}, "constant, linear or cosine, but is 'step'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_say_what_is_allowed(change, message):
    with pytest.raises(InputError, match=message):
        OptimizerSettings(**change)
