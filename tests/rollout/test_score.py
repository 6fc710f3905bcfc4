"""Hidden states, log-probabilities and scores of responses: positions, and independence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import Sequences
from rlhf_jax.rollout import end_scores, response_hidden, response_logprobs
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


logprobs_of = jax.jit(response_logprobs, static_argnums=0, static_argnames="temperature")


@pytest.fixture(scope="module")
def reward_params(params):
    kernel = np.random.default_rng(6).normal(size=16).astype(np.float32)
    return {"model": params, "head": {"kernel": jnp.asarray(kernel)}}


def real(tokens, mask):
    return list(tokens[mask])


def test_a_token_is_predicted_from_the_position_before_it(model, params, prompts, responses):
    tokens, mask = responses[0][:, 0], responses[1][:, 0]
    states = np.asarray(hidden_of(model, params, Sequences(*prompts, tokens, mask)))
    assert states.shape == (4, 6, 16)
    for row in range(4):
        prompt, response = real(prompts[0][row], prompts[1][row]), real(tokens[row], mask[row])
        for t in range(len(response)):
            # The state at the token before token t.
            alone = hidden_by_loop(params, model.config, prompt + response[:t])[-1]
            np.testing.assert_allclose(states[row, t], alone, rtol=1e-3, atol=1e-3)


def test_padding_changes_no_state(model, params, prompts, responses):
    tokens, mask = responses[0][:, 0], responses[1][:, 0]
    before = np.asarray(hidden_of(model, params, Sequences(*prompts, tokens, mask)))
    after = hidden_of(
        model,
        params,
        Sequences(
            np.where(prompts[1], prompts[0], 2**30),
            prompts[1],
            np.where(mask, tokens, -1),
            mask,
        ),
    )
    np.testing.assert_array_equal(np.asarray(after)[mask], before[mask])
    assert np.isfinite(after).all()


def test_a_score_is_read_at_the_last_real_token(model, params, reward_params, prompts, responses):
    scores = scores_of(model, reward_params, Sequences(*prompts, *responses))
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
        scores_of(model, reward_params, Sequences(*prompts, poisoned, responses[1])), scores
    )


def test_a_hole_in_the_mask_changes_no_score(model, reward_params, prompts, responses):
    """Such as tool output: the score is that of the tokens around it, at the last of them."""
    tokens, mask = (np.insert(x, 1, fill, axis=2)[..., :6] for x, fill in zip(responses, (3, 0)))
    scores, expected = (
        np.asarray(scores_of(model, reward_params, Sequences(*prompts, *arrays)))
        for arrays in ((tokens, mask), responses)
    )
    fits = responses[1].sum(axis=2) < 6
    assert (mask[..., 0] & ~mask[..., 1] & mask[..., 2]).any()
    np.testing.assert_allclose(scores[fits], expected[fits], rtol=1e-4, atol=1e-4)


def test_responses_are_scored_alone_or_together(model, reward_params, prompts, responses):
    together = np.asarray(scores_of(model, reward_params, Sequences(*prompts, *responses)))
    for k in range(3):
        alone = scores_of(model, reward_params, Sequences(*prompts, *(x[:, k] for x in responses)))
        assert alone.shape == (4,)
        np.testing.assert_allclose(alone, together[:, k], rtol=1e-4, atol=1e-4)


def test_texts_without_a_prompt_are_scored(model, params, reward_params, responses):
    nothing = np.zeros((4, 0), np.int32), np.zeros((4, 0), bool)
    scores = scores_of(model, reward_params, Sequences(*nothing, *responses))
    kernel = np.asarray(reward_params["head"]["kernel"], np.float64)
    for row, k in np.ndindex(4, 3):
        text = real(responses[0][row, k], responses[1][row, k])
        expected = hidden_by_loop(params, model.config, text)[-1] @ kernel
        np.testing.assert_allclose(scores[row, k], expected, rtol=1e-3, atol=1e-3)
    # A prompt that is all padding is none.
    padding = np.full((4, 2), 3, np.int32), np.zeros((4, 2), bool)
    np.testing.assert_allclose(
        scores_of(model, reward_params, Sequences(*padding, *responses)),
        scores,
        rtol=1e-4,
        atol=1e-4,
    )


def test_padding_of_the_batch_scores_something_finite(model, reward_params, prompts, responses):
    tokens, mask = prompts[0], np.zeros_like(prompts[1])
    sequences = Sequences(tokens, mask, responses[0], responses[1] & False)
    scores = scores_of(model, reward_params, sequences)
    assert np.isfinite(scores).all()


def test_k_responses_have_the_logprobs_of_each_alone(model, params, prompts, responses):
    """With the prompt run once; also above frozen layers, and for responses of one token."""
    shared = Sequences(*prompts, *responses)
    logprobs, entropy, hidden = logprobs_of(model, params, shared, temperature=0.7)
    assert (logprobs.shape, entropy.shape, hidden.shape) == ((4, 3, 6), (4, 3, 6), (4, 3, 6, 16))
    repeated = Sequences(
        *(np.repeat(x, 3, axis=0) for x in prompts), *(x.reshape(12, 6) for x in responses)
    )
    alone = logprobs_of(model, params, repeated, temperature=0.7)
    mask = responses[1]
    for ours, theirs in zip((logprobs, entropy, hidden), alone, strict=True):
        theirs = np.asarray(theirs).reshape(ours.shape)
        np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], rtol=1e-4, atol=1e-4)
    frozen, upper = model.split(params, 1)
    halves = logprobs_of(model, upper, shared, temperature=0.7, frozen=frozen)[0]
    np.testing.assert_allclose(np.asarray(halves)[mask], logprobs[mask], rtol=1e-4, atol=1e-4)
    first = shared._replace(tokens=shared.tokens[..., :1], mask=mask[..., :1])
    of_one = logprobs_of(model, params, first, temperature=0.7)[0]
    np.testing.assert_allclose(of_one[..., 0], logprobs[..., 0], rtol=1e-4, atol=1e-4)


def test_padding_changes_no_logprob_of_k_responses(model, params, prompts, responses):
    before = logprobs_of(model, params, Sequences(*prompts, *responses), temperature=1.0)[0]
    poisoned = Sequences(
        np.where(prompts[1], prompts[0], 2**30),
        prompts[1],
        np.where(responses[1], responses[0], 2**30),
        responses[1],
    )
    after = logprobs_of(model, params, poisoned, temperature=1.0)[0]
    np.testing.assert_array_equal(np.asarray(after)[responses[1]], np.asarray(before)[responses[1]])
