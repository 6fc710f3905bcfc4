"""PPO with frozen lower layers: the update of the full network, with nothing frozen moved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.training import ppo, sft
from rlhf_jax.training.trainable import Trainable
from tests.training.ppo_by_loop import (
    EOS,
    KEY,
    SCORES,
    SETTINGS,
    experience_by_loop,
)
from tests.training.scans import scans
from tests.training.test_ppo_texts import ROWS, text_batch

RATE = 0.05
TWICE = dataclasses.replace(SETTINGS, num_ppo_epochs=2, num_mini_batches=2)
UPPER = dataclasses.replace(TWICE, num_layers_unfrozen=1)


def masking():
    """Multiplies gradients by its state: 1, or 0 where a test freezes."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.ones_like, params),
        lambda grads, mask, params=None: (jax.tree.map(jnp.multiply, grads, mask), mask),
    )


# The rate is in the state as well, so that one program runs with several.
OPTIMIZER = optax.chain(
    masking(), optax.inject_hyperparams(optax.sgd)(learning_rate=RATE, momentum=0.9)
)


def with_rate(state, rate):
    mask, sgd = state.opt_state
    rates = {**sgd.hyperparams, "learning_rate": jnp.float32(rate)}
    return state._replace(opt_state=(mask, sgd._replace(hyperparams=rates)))


def updating(model, settings, **kwargs):
    initial = {"optimizer": OPTIMIZER, "stop_token_ids": (EOS,), **kwargs}
    return jax.jit(ppo.make_update_step(model, settings, **initial))


@pytest.fixture(scope="module")
def update(model):
    """The update that all these tests share: of two layers one trains."""
    return updating(model, UPPER)


def frozen_state(model, state, ref_params):
    """A state with a reference of its own above the frozen layers, and a head that is not zero."""
    initial = ppo.init_state(model, state.params["model"], UPPER, KEY, optimizer=OPTIMIZER)
    frozen = {**initial.frozen, "ref": model.split(ref_params, 1)[1]}
    params = {**initial.params, "value_head": state.params["value_head"]}
    return initial._replace(params=params, frozen=frozen)


def full_state(model, state):
    """The same without a frozen half: the optimizer's mask holds still what is frozen there."""
    params = {**state.params, "model": ppo.policy_params(model, state)}
    mask, sgd = OPTIMIZER.init(params)
    lower, upper = model.split(mask["model"], 1)
    held = model.merge(jax.tree.map(jnp.zeros_like, lower), upper)
    return state._replace(
        params=params,
        frozen={"ref": ppo.reference_params(model, state)},
        opt_state=({**mask, "model": held}, sgd),
    )


def close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def test_an_update_is_that_of_the_full_network_with_frozen_lower_layers(
    model, state, ref_params, batch, rollout, update
):
    start = frozen_state(model, state, ref_params)
    after, metrics, scored = update(start, batch, rollout, SCORES, KEY)
    plain, full_update = full_state(model, start), updating(model, TWICE)
    expected, others, theirs = full_update(plain, batch, rollout, SCORES, KEY)
    close(ppo.policy_params(model, after), expected.params["model"], rtol=1e-4, atol=2e-5)
    close(after.params["value_head"], expected.params["value_head"], rtol=1e-4, atol=2e-5)
    close(scored, theirs, rtol=1e-4, atol=1e-5)
    for name in set(others) - {"train/grad_norm"}:  # the optimizer's mask comes after the norm
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-3, atol=1e-5, err_msg=name)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, start.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("unfrozen", [0, 2])
def test_there_may_be_nothing_above_or_only_embeddings_below(
    unfrozen, model, params, batch, rollout
):
    settings = dataclasses.replace(TWICE, num_layers_unfrozen=unfrozen)

    def run(params):
        start = ppo.init_state(model, params, settings, KEY, optimizer=OPTIMIZER)
        step = ppo.make_update_step(model, settings, optimizer=OPTIMIZER, stop_token_ids=(EOS,))
        return start, step(start, batch, rollout, SCORES, KEY)[0]

    start, after = jax.eval_shape(run, params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, start)
    assert start.params["model"]["ln_f"]["scale"].shape == (16,)
    assert start.params["model"]["layers"]["ln_1"]["scale"].shape == (unfrozen, 16)


def test_the_first_pass_is_that_of_the_loops(model, state, ref_params, batch, rollout, update):
    start = frozen_state(model, state, ref_params)
    _, _, scored = update(start, batch, rollout, SCORES, KEY)
    examples = experience_by_loop(model, TWICE, full_state(model, start), scored)
    for name in ("logprobs", "ref_logprobs", "values"):
        actual = np.asarray(getattr(scored, name))[np.asarray(scored.mask)]
        expected = np.concatenate([getattr(example, name) for example in examples])
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_20_the_reference_and_all_that_is_frozen_do_not_move_by_one_bit(
    model, state, ref_params, batch, rollout, update
):
    start = running = frozen_state(model, state, ref_params)
    seen = []
    for number in range(3):
        running, _, scored = update(
            running, batch, rollout, SCORES, jax.random.fold_in(KEY, number)
        )
        seen.append(scored)
    jax.tree.map(np.testing.assert_array_equal, running.frozen, start.frozen)
    for scored in seen[1:]:
        np.testing.assert_array_equal(scored.ref_logprobs, seen[0].ref_logprobs)
        assert np.abs(scored.logprobs - seen[0].logprobs).max() > 1e-2
    lower, _ = model.split(ppo.policy_params(model, running), 1)
    jax.tree.map(np.testing.assert_array_equal, lower, start.frozen["base"])


def test_at_first_the_kl_is_exactly_zero_and_every_ratio_one(model, params, batch, rollout, update):
    start = ppo.init_state(model, params, UPPER, KEY, optimizer=OPTIMIZER)
    # Without a rate all four updates are first ones, from the activations that were kept.
    _, metrics, scored = update(with_rate(start, 0.0), batch, rollout, SCORES, KEY)
    np.testing.assert_array_equal(scored.logprobs, scored.ref_logprobs)
    assert float(metrics["objective/kl"]) == 0.0
    assert float(metrics["val/ratio"]) == pytest.approx(1.0, abs=1e-6)
    assert float(metrics["policy/approxkl_avg"]) == pytest.approx(0.0, abs=1e-11)


def test_frozen_layers_are_stored_once_without_optimizer_state(model, params):
    settings = dataclasses.replace(SETTINGS, num_layers_unfrozen=1)
    adam = optax.adam(1e-3)
    start = ppo.init_state(model, params, settings, KEY, optimizer=adam)
    lower, upper = model.split(params, 1)
    jax.tree.map(np.testing.assert_array_equal, start.frozen, {"ref": upper, "base": lower})
    jax.tree.map(np.testing.assert_array_equal, start.params["model"], upper)
    trained = {"model": upper, "value_head": start.params["value_head"]}
    shapes = jax.tree.map(lambda x: x.shape, (start.params, start.opt_state[0].mu))
    assert shapes == jax.tree.map(lambda x: x.shape, (trained, trained))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(start)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.newest
@pytest.mark.parametrize("value_model", ["shared", "policy"])
def test_the_frozen_layers_run_once_for_all_epochs(value_model):
    """Of nine layers seven are frozen; two epochs of three minibatches are a scan of six."""
    model = GPT2(GPT2Config(vocab_size=11, n_positions=12, n_embd=8, n_layer=9, n_head=1))
    settings = dataclasses.replace(
        SETTINGS,
        batch_size=3,
        num_ppo_epochs=2,
        num_mini_batches=3,
        num_layers_unfrozen=2,
        value_model=value_model,
        surrogate="kl_penalty",
    )
    optimizer = optax.sgd(1.0)

    def init(params):
        return ppo.init_state(model, params, settings, KEY, optimizer=optimizer)

    state = jax.eval_shape(init, jax.eval_shape(model.init, KEY))
    ones = jnp.ones((3, 4), bool)
    batch = PromptBatch(jnp.ones((3, 4), jnp.int32), ones, jnp.arange(3))
    rollout = Rollout(jnp.ones((3, 5), jnp.int32), jnp.ones((3, 5), bool), jnp.zeros((3, 5)))
    update = ppo.make_update_step(model, settings, optimizer=optimizer, stop_token_ids=(EOS,))
    jaxpr = jax.make_jaxpr(update)(state, batch, rollout, jnp.zeros(3), KEY).jaxpr
    result = list(scans(jaxpr))
    assert [inside for length, inside in result if length == 7] == [()]
    networks = 1 + (value_model == "policy")
    # Forwards and backwards in each update; before, the reference too; after, the new policy.
    assert [inside for length, inside in result if length == 2].count((6,)) == 2 * networks
    assert [inside for length, inside in result if length == 2].count(()) == networks + 2
    assert 9 not in {length for length, _ in result}


@pytest.mark.newest
def test_texts_mixed_in_have_the_gradient_of_the_full_policy(model, params):
    texts, (lower, upper) = text_batch(ROWS), model.split(params, 1)

    def loss(trained, frozen=None):
        return sft.text_loss(model, Trainable(trained, frozen), texts)[0]

    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    expected, full = loss_and_gradient(params)
    result, gradient = loss_and_gradient(upper, lower)
    assert float(result) == pytest.approx(float(expected), rel=1e-5)
    close(gradient, model.split(full, 1)[1], rtol=1e-4, atol=1e-6)


def test_sampling_uses_the_full_policy(model, params, batch):
    settings = dataclasses.replace(SETTINGS, num_layers_unfrozen=1)
    start = ppo.init_state(model, params, settings, KEY, optimizer=OPTIMIZER)
    jax.tree.map(np.testing.assert_array_equal, ppo.policy_params(model, start), params)
    half = ppo.make_rollout_step(model, settings, stop_token_ids=(EOS,))
    assert jax.eval_shape(half, start, batch, KEY).tokens.shape == (4, 5)


def test_a_reference_shares_the_frozen_layers_or_is_refused(model, params, ref_params):
    settings = dataclasses.replace(SETTINGS, num_layers_unfrozen=1)
    above = model.merge(model.split(params, 1)[0], model.split(ref_params, 1)[1])
    start = ppo.init_state(model, params, settings, KEY, optimizer=OPTIMIZER, ref_params=above)
    jax.tree.map(np.testing.assert_array_equal, ppo.reference_params(model, start), above)
    with pytest.raises(InputError, match="ref_params differ from params in layers or embeddings"):
        ppo.init_state(model, params, settings, KEY, ref_params=ref_params)
    with pytest.raises(InputError, match="call init_state outside of jit"):
        jax.eval_shape(lambda p: ppo.init_state(model, p, settings, KEY, ref_params=p), params)


@pytest.mark.parametrize("unfrozen", [-1, 3])
def test_more_layers_than_there_are_or_less_than_none_are_refused(unfrozen, model, params):
    expected = {
        -1: "ppo.num_layers_unfrozen must not be negative, but is -1.",
        3: "ppo.num_layers_unfrozen must be from 0 to the model's n_layer = 2, but is 3",
    }[unfrozen]

    def init():
        settings = dataclasses.replace(SETTINGS, num_layers_unfrozen=unfrozen)
        return ppo.init_state(model, params, settings, KEY)

    with pytest.raises(InputError, match=expected):
        init()
