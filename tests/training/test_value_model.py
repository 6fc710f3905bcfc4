"""A value model of its own: where it starts, what it says, and that it leaves the policy alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import ScoredRollout
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.training import online, ppo
from rlhf_jax.training.values import init_values, response_values
from tests.training.ppo_by_loop import (
    EOS,
    KEY,
    RATE,
    SCORES,
    SETTINGS,
    SGD,
    experience_by_loop,
    losses_by_loop,
    texts_of,
    values_by_loop,
)

OF_REWARD = dataclasses.replace(SETTINGS, value_model="reward")
SHARING = dataclasses.replace(SETTINGS, value_model="policy", num_layers_unfrozen=1)


@pytest.fixture(scope="module")
def initial(model, reward_model, state, reward_params, batch, rollout):
    """(state before, after, metrics, scored) of an update whose values start as a reward model."""
    start = ppo.init_state(
        model,
        state.params["model"],
        OF_REWARD,
        KEY,
        optimizer=SGD,
        ref_params=state.frozen["ref"],
        value_params=reward_params,
    )
    update = ppo.make_update_step(
        model, OF_REWARD, value_model=reward_model, optimizer=SGD, stop_token_ids=(EOS,)
    )
    return start, *jax.jit(update)(start, batch, rollout, SCORES, KEY)


def scoring(model, settings, value_model):
    """(state, batch, rollout, scores) -> ScoredRollout, with the values of a value model."""

    def score(state, batch, rollout, scores):
        parts = (settings, value_model, state.params, state.frozen)
        values = functools.partial(response_values, *parts)
        arguments = (model, settings, state, batch, rollout, scores)
        experience, _, _ = online.make_experience(
            *arguments, kl_coef=0.0, stop_token_ids=(EOS,), values=values
        )
        return experience.rollout

    return score


def own_values(value_model, start, scored):
    """[values of each example] by loops, from a state with all parameters of the value model."""
    own = start.params["value_model"]
    params = {"model": own["model"], "value_head": own["head"]}
    return [values_by_loop(params, value_model.config, *text) for text in texts_of(scored)]


def assert_values(scored, expected):
    values = np.asarray(scored.values)[np.asarray(scored.mask)]
    np.testing.assert_allclose(values, np.concatenate(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.newest
def test_14_the_values_start_as_those_of_the_reward_model(initial, reward_model, reward_params):
    start, _, _, scored = initial
    own = start.params["value_model"]
    jax.tree.map(np.testing.assert_array_equal, own["model"], reward_params["model"])
    np.testing.assert_array_equal(own["head"]["kernel"], reward_params["head"]["kernel"])
    assert float(own["head"]["bias"]) == 0.0
    assert set(start.params) == {"model", "value_model"}
    assert_values(scored, own_values(reward_model, start, scored))
    assert np.abs(scored.values).max() > 0.1


def test_each_of_the_two_follows_its_own_loss(initial, model, reward_model, examples_of):
    """Along each one's update its loss, and that loss alone, falls as the sum of squares says."""
    start, after, metrics, scored = initial
    examples = examples_of(start, scored)
    value_loss = losses_by_values(reward_model, start.params, examples)
    assert float(metrics["loss/value_avg"]) == pytest.approx(value_loss, rel=1e-3)
    gradient = jax.tree.map(
        lambda old, new: (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / RATE,
        start.params,
        after.params,
    )
    for part, loss in (
        ("value_model", lambda p: OF_REWARD.vf_coef * losses_by_values(reward_model, p, examples)),
        ("model", lambda p: policy_loss(model, p, examples)),
    ):
        square = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient[part]))
        sides = [
            loss({**start.params, part: moved(start.params[part], gradient[part], epsilon)})
            for epsilon in (1e-5, -1e-5)
        ]
        assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(square, rel=1e-2), part


@pytest.fixture(scope="module")
def examples_of(model, reward_model):
    """The examples of `experience_by_loop`, with the values of the value model."""

    def examples(start, scored):
        own = own_values(reward_model, start, scored)
        return experience_by_loop(model, OF_REWARD, start, scored, values=own)

    return examples


def losses_by_values(reward_model, params, examples):
    """The value loss, half the larger square, mean over real tokens."""
    own, losses = params["value_model"], []
    full = {"model": own["model"], "value_head": own["head"]}
    for example in examples:
        values = values_by_loop(full, reward_model.config, example.prompt, example.response)
        clip = OF_REWARD.cliprange_value
        near = example.values + np.clip(values - example.values, -clip, clip)
        losses.extend(
            0.5 * np.maximum((values - example.returns) ** 2, (near - example.returns) ** 2)
        )
    return np.mean(losses)


def policy_loss(model, params, examples):
    with_head = {**params, "value_head": {"kernel": np.zeros(16), "bias": 0.0}}
    return losses_by_loop(model, OF_REWARD, with_head, examples)[0]


def moved(tree, gradient, epsilon):
    return jax.tree.map(lambda p, g: np.asarray(p, np.float64) + epsilon * g, tree, gradient)


@pytest.mark.newest
def test_a_copy_of_the_policy_shares_its_frozen_layers_and_nothing_else(
    model, params, batch, rollout
):
    start = ppo.init_state(model, params, SHARING, KEY, optimizer=SGD)
    upper = model.split(params, 1)[1]
    own = start.params["value_model"]
    jax.tree.map(np.testing.assert_array_equal, own["model"], upper)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(own["head"]))
    kernel = jnp.asarray(np.random.default_rng(9).normal(size=16), jnp.float32)
    head = {"kernel": kernel, "bias": jnp.float32(0.2)}
    other = {"model": jax.tree.map(lambda x: 1.3 * x, upper), "head": head}
    start = start._replace(params={**start.params, "value_model": other})
    scored = jax.jit(scoring(model, SHARING, model))(start, batch, rollout, SCORES)
    own = start.params["value_model"]
    full = {**own, "model": model.merge(start.frozen["base"], own["model"])}
    assert_values(scored, own_values(model, start._replace(params={"value_model": full}), scored))


def test_values_of_a_reward_model_are_its_own_beside_frozen_layers(
    model, reward_model, params, reward_params, batch, rollout
):
    settings = dataclasses.replace(OF_REWARD, num_layers_unfrozen=1)
    start = ppo.init_state(model, params, settings, KEY, reward_params=reward_params)
    own = start.params["value_model"]["model"]
    jax.tree.map(np.testing.assert_array_equal, own, reward_params["model"])
    score = scoring(model, settings, reward_model)
    scored = jax.eval_shape(score, start, batch, rollout, SCORES)  # of another width
    assert scored.values.shape == (4, 5)


@pytest.mark.newest
def test_the_value_loss_does_not_touch_the_policy(model, params, batch, rollout):
    """With advantages of zero the policy has no gradient of its own."""
    settings = dataclasses.replace(SETTINGS, value_model="policy", vf_coef=10.0)
    start = ppo.init_state(model, params, settings, KEY, optimizer=SGD)
    parts = (batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
    zeros = jnp.zeros(rollout.tokens.shape)
    scored = ScoredRollout(*parts, zeros, zeros, zeros, jnp.zeros(4))
    targets = ppo.Targets(scored, advantages=zeros, returns=zeros + 1.0, states=None)
    loss = functools.partial(ppo._loss, model, model, settings, start)
    start.params["value_model"]["head"]["kernel"] += 1.0  # one of zero would hand nothing on
    batch = (targets, None)
    grads = jax.jit(jax.grad(loss, has_aux=True))(start.params, batch, None, None)[0]
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["model"]))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["value_model"]))


def test_what_values_cannot_start_from_is_refused(model, reward_model, params):
    with pytest.raises(InputError, match="needs a reward model in JAX to start from"):
        ppo.init_state(model, params, OF_REWARD, KEY)
    fewer = GPT2(dataclasses.replace(reward_model.config, vocab_size=9))
    with pytest.raises(InputError, match="but it has a vocab_size of 9 and the policy one of 11"):
        ppo.make_step(model, OF_REWARD, reward_model=fewer)
    with pytest.raises(InputError, match="must be shared, policy or reward, but is 'own'"):
        dataclasses.replace(SETTINGS, value_model="own")


def test_a_value_model_has_no_unembedding_of_its_own():
    model = GPT2(GPT2Config(11, 8, 8, 1, 1, tie_word_embeddings=False))
    settings = dataclasses.replace(SETTINGS, value_model="policy", num_layers_unfrozen=None)
    values = init_values(settings, model, model.init(KEY), None)
    assert "lm_head" not in values["value_model"]["model"]
