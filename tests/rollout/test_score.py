"""What is read off responses: at the right position, and from each response alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rollout import end_scores, response_hidden
from tests.models.gpt2_by_loop import hidden_by_loop

hidden_of = jax.jit(response_hidden, static_argnums=0)
scores_of = jax.jit(end_scores, static_argnums=0)


@pytest.fixture(scope="module")
def responses():
    """(tokens i32[4, 3, 6], mask): three responses to each of four prompts, right-padded."""
    rng = np.random.default_rng(5)
    lengths = np.array([[6, 1, 3], [2, 2, 2], [1, 6, 5], [4, 3, 1]])
    mask = np.arange(6) < lengths[..., None]
    tokens = np.where(mask, rng.integers(0, 11, size=mask.shape), 9)
    return tokens.astype(np.int32), mask


@pytest.fixture(scope="module")
def reward_params(params):
    kernel = np.random.default_rng(6).normal(size=16).astype(np.float32)
    return {"model": params, "head": {"kernel": jnp.asarray(kernel)}}


def real(tokens, mask):
    return list(tokens[mask])


def test_a_token_is_predicted_from_the_position_before_it(model, params, prompts, responses):
    tokens, mask = responses[0][:, 0], responses[1][:, 0]
    states = np.asarray(hidden_of(model, params, *prompts, tokens, mask))
    assert states.shape == (4, 6, 16)
    for row in range(4):
        prompt, response = real(prompts[0][row], prompts[1][row]), real(tokens[row], mask[row])
        for t in range(len(response)):
            # The state of the text that ends right before token t.
            alone = hidden_by_loop(params, model.config, prompt + response[:t])[-1]
            np.testing.assert_allclose(states[row, t], alone, rtol=1e-3, atol=1e-3)


def test_padding_changes_no_state(model, params, prompts, responses):
    tokens, mask = responses[0][:, 0], responses[1][:, 0]
    before = np.asarray(hidden_of(model, params, *prompts, tokens, mask))
    after = hidden_of(
        model,
        params,
        np.where(prompts[1], prompts[0], 2**30),
        prompts[1],
        np.where(mask, tokens, -1),
        mask,
    )
    np.testing.assert_array_equal(np.asarray(after)[mask], before[mask])
    assert np.isfinite(after).all()


def test_a_score_is_read_at_the_last_real_token(model, params, reward_params, prompts, responses):
    scores = scores_of(model, reward_params, *prompts, *responses)
    assert scores.dtype == jnp.float32
    kernel = np.asarray(reward_params["head"]["kernel"], np.float64)
    expected = np.zeros((4, 3))
    for row, k in np.ndindex(4, 3):
        text = real(prompts[0][row], prompts[1][row]) + real(
            responses[0][row, k], responses[1][row, k]
        )
        expected[row, k] = hidden_by_loop(params, model.config, text)[-1] @ kernel
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    poisoned = np.where(responses[1], responses[0], 2**30)
    np.testing.assert_array_equal(
        scores_of(model, reward_params, *prompts, poisoned, responses[1]), scores
    )


def test_responses_are_scored_alone_or_together(model, reward_params, prompts, responses):
    together = np.asarray(scores_of(model, reward_params, *prompts, *responses))
    for k in range(3):
        alone = scores_of(model, reward_params, *prompts, *(x[:, k : k + 1] for x in responses))
        np.testing.assert_allclose(alone[:, 0], together[:, k], rtol=1e-4, atol=1e-4)


def test_texts_without_a_prompt_are_scored(model, params, reward_params, responses):
    nothing = np.zeros((4, 0), np.int32), np.zeros((4, 0), bool)
    scores = scores_of(model, reward_params, *nothing, *responses)
    kernel = np.asarray(reward_params["head"]["kernel"], np.float64)
    for row, k in np.ndindex(4, 3):
        text = real(responses[0][row, k], responses[1][row, k])
        expected = hidden_by_loop(params, model.config, text)[-1] @ kernel
        np.testing.assert_allclose(scores[row, k], expected, rtol=1e-3, atol=1e-3)
    # A prompt that is all padding is none.
    padding = np.full((4, 2), 3, np.int32), np.zeros((4, 2), bool)
    np.testing.assert_allclose(
        scores_of(model, reward_params, *padding, *responses), scores, rtol=1e-4, atol=1e-4
    )


def test_empty_rows_score_something_finite(model, reward_params, prompts, responses):
    tokens, mask = prompts[0], np.zeros_like(prompts[1])
    scores = scores_of(model, reward_params, tokens, mask, responses[0], responses[1] & False)
    assert np.isfinite(scores).all()
