"""GPT-2 through a cache, and responses that share a prompt, against full sequences."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import embedding, stacked
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.interface import SharedPrompt, positions_from
from rlhf_jax.models.layers import UnstackedLayers
from tests.models.tiny_gpt2 import CONFIG, MODEL, VOCABULARY, hidden, pad


def run_with_cache(model, params, tokens, mask, pieces):
    """Hidden states of all positions, fed piece by piece through a cache with room to spare."""
    positions = positions_from(mask)
    cache = model.init_cache(tokens.shape[0], tokens.shape[1] + 2)
    states, start = [], 0
    for length in pieces:
        at = slice(start, start + length)
        x = model.embed(params, tokens[:, at], positions[:, at])
        x, cache = model.layers(params["layers"], x, mask[:, at], positions[:, at], cache)
        states.append(model.final(params, x))
        start += length
    return jnp.concatenate(states, axis=1), cache


def test_layers_one_by_one_decode_as_a_stack_does(params, texts):
    """As one CPU decodes, and as all other devices do."""
    tokens, mask = (jnp.asarray(x) for x in pad(texts, 9, "left", 5))
    positions = positions_from(mask)

    def decode(params):
        states, memory = [], MODEL.init_cache(4, 9)
        for at in (slice(0, 7), slice(7, 8), slice(8, 9)):
            x = MODEL.embed(params, tokens[:, at], positions[:, at], decode=at.start > 0)
            x, memory = MODEL.layers(params["layers"], x, mask[:, at], positions[:, at], memory)
            states.append(MODEL.padded_logits(params, MODEL.final(params, x)[:, -1], decode=True))
        return states, [*memory.keys], [*memory.values], memory.mask, memory.length

    ready = jax.jit(MODEL.for_decoding)(params)
    assert isinstance(ready["layers"], UnstackedLayers)
    actual, expected = (jax.jit(decode)(x) for x in (ready, params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
    )


def test_parameters_for_decoding_stay_as_they_are(params):
    ready = MODEL.for_decoding(params)
    assert all(
        one is other
        for one, other in zip(
            jax.tree.leaves(ready), jax.tree.leaves(MODEL.for_decoding(ready)), strict=True
        )
    )


def test_deep_models_keep_their_stack(params, monkeypatch):
    monkeypatch.setattr(stacked, "MAX_UNSTACKED_LAYERS", 1)
    ready = MODEL.for_decoding(params)
    assert ready["layers"].keys() == params["layers"].keys()
    again = MODEL.for_decoding(ready)
    assert all(map(operator.is_, jax.tree.leaves(again), jax.tree.leaves(ready)))


def test_parameters_for_decoding_are_not_split(params):
    with pytest.raises(ValueError, match="give those of before"):
        MODEL.split(MODEL.for_decoding(params), 1)


@pytest.mark.parametrize("count", [1, embedding.FEW_STATES, embedding.FEW_STATES + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_few_and_of_many_states(count, dtype):
    model = GPT2(CONFIG, dtype=dtype)
    params = model.init(jax.random.key(0))
    states = jax.random.normal(jax.random.key(1), (count, CONFIG.n_embd)).astype(dtype)
    table = params["wte"]["embedding"].astype(dtype).astype(jnp.float32)
    expected = (states.astype(jnp.float32) @ table.T)[:, : CONFIG.vocab_size]
    for decode in (False, True):
        logits = functools.partial(model.logits, decode=decode)
        is_few = decode and dtype == "float32" and count <= embedding.FEW_STATES
        # The table multiplies few states; a barrier keeps the order of the operands.
        assert ("optimization_barrier" in str(jax.make_jaxpr(logits)(params, states))) == is_few
        for x, y in ((states, expected), (states[:, None], expected[:, None])):
            np.testing.assert_allclose(jax.jit(logits)(params, x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [(4, 1, 1, 1, 1, 1), (3, 2, 4), (9,)], ids=str)
def test_decoding_with_a_cache_equals_a_forward_pass(pieces, params, texts):
    tokens, mask = pad(texts, 9, "left", 5)
    mask[3, 8] = False  # a response that has ended
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    run = jax.jit(run_with_cache, static_argnums=(0, 4))
    states, cache = run(MODEL, params, tokens, mask, pieces)
    full = np.asarray(hidden(params, tokens, mask))
    real = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(states)[real], full[real], rtol=1e-4, atol=1e-4)
    assert int(cache.length) == 9
    np.testing.assert_array_equal(cache.mask[:, :9], mask)
    assert not np.asarray(cache.mask[:, 9:]).any()


def test_a_cache_is_read_no_further_than_it_was_written(params, texts):
    tokens, mask = (jnp.asarray(x) for x in pad(texts, 9, "left", 5))
    positions = positions_from(mask)

    @jax.jit
    def last_state(poison):
        cache = MODEL.init_cache(4, 12)
        x = MODEL.embed(params, tokens[:, :8], positions[:, :8])
        _, cache = MODEL.layers(params["layers"], x, mask[:, :8], positions[:, :8], cache)
        cache = cache._replace(
            keys=cache.keys.at[:, :, 8:].set(poison),
            values=cache.values.at[:, :, 8:].set(poison),
            mask=cache.mask.at[:, 8:].set(True),
        )
        x = MODEL.embed(params, tokens[:, 8:], positions[:, 8:])
        return MODEL.layers(params["layers"], x, mask[:, 8:], positions[:, 8:], cache)[0]

    np.testing.assert_array_equal(last_state(0.0), last_state(1e4))


def states_with_prefix(params, prompts, prompt_mask, responses, mask):
    """[B * K, T, D]: each prompt run once."""
    count = responses.shape[0] // prompts.shape[0]
    positions = positions_from(prompt_mask)
    x = MODEL.embed(params, prompts, positions)
    cache = MODEL.init_cache(*prompts.shape)
    _, prefix = MODEL.layers(params["layers"], x, prompt_mask, positions, cache)
    lengths = jnp.repeat(prompt_mask.sum(axis=1), count)[:, None]
    positions = positions_from(mask) + lengths
    x = MODEL.embed(params, responses, positions)
    x, cache = MODEL.layers(params["layers"], x, mask, positions, prefix=prefix)
    assert cache is None
    return MODEL.final(params, x)


def states_with_shared_prompt(params, prompts, prompt_mask, responses, mask):
    """[B * K, T, D]: each prompt and its responses in one sequence."""
    batch, width = prompts.shape
    count = responses.shape[0] // batch
    lengths = jnp.repeat(prompt_mask.sum(axis=1), count)[:, None]
    positions = jnp.concatenate(
        [positions_from(prompt_mask), (positions_from(mask) + lengths).reshape(batch, -1)], axis=1
    )
    tokens = jnp.concatenate([prompts, responses.reshape(batch, -1)], axis=1)
    full_mask = jnp.concatenate([prompt_mask, mask.reshape(batch, -1)], axis=1)
    x = MODEL.embed(params, tokens, positions)
    shared = SharedPrompt(width, count)
    x, cache = MODEL.layers(params["layers"], x, full_mask, positions, shared=shared)
    assert cache is None
    return MODEL.final(params, x[:, width:].reshape(*responses.shape, -1))


def states_repeated(params, prompts, prompt_mask, responses, mask):
    """[B * K, T, D]: each prompt run K times, in front of each of its responses."""
    count = responses.shape[0] // prompts.shape[0]
    prompts, prompt_mask = (np.repeat(x, count, axis=0) for x in (prompts, prompt_mask))
    tokens = jnp.concatenate([prompts, responses], axis=1)
    states = MODEL.hidden(params, tokens, jnp.concatenate([prompt_mask, mask], axis=1))
    return states[:, prompts.shape[1] :]


@pytest.mark.newest
@pytest.mark.parametrize("width", [7, 0])
@pytest.mark.parametrize("states_of", [states_with_prefix, states_with_shared_prompt])
def test_responses_that_share_a_prompt_equal_each_alone(states_of, width, params, texts):
    rng, count = np.random.default_rng(2), 3
    if not width and states_of is states_with_prefix:
        pytest.skip("without a prompt there is no prefix")
    prompts, prompt_mask = (x[:, :width] for x in pad(texts, 7, "left", 3))
    lengths = rng.integers(1, 6, size=4 * count)
    responses, mask = pad([rng.integers(0, VOCABULARY, n) for n in lengths], 5, "right", 8)
    weights = rng.normal(size=(4 * count, 5, CONFIG.n_embd)).astype(np.float32)

    def loss(params, states_of):
        states = states_of(params, prompts, prompt_mask, responses, mask)
        return jnp.sum(jnp.where(mask[..., None], states * weights, 0.0)), states

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    gradient, states = run(params, states_of)
    expected_gradient, expected = run(params, states_repeated)
    np.testing.assert_allclose(states[mask], expected[mask], rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        gradient,
        expected_gradient,
    )


def test_a_cache_and_a_prefix_exclude_each_other(params):
    x, mask, cache = jnp.zeros((1, 1, 16)), jnp.ones((1, 1), bool), MODEL.init_cache(1, 2)
    with pytest.raises(ValueError, match="one of the three"):
        MODEL.layers(params["layers"], x, mask, jnp.zeros((1, 1), int), cache, cache)
