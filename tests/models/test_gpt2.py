"""GPT-2 on full texts: against a forward pass by loops, under padding and packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.interface import positions_from
from tests.models.gpt2_by_loop import hidden_by_loop, logits_by_loop
from tests.models.tiny_gpt2 import CONFIG, MODEL, VOCABULARY, busy_params, hidden, pad


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_layer": 1, "activation_function": "gelu"},
        {"n_layer": 3, "n_head": 4, "n_inner": 24, "activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_matches_a_forward_pass_by_loops(change, texts):
    model = GPT2(dataclasses.replace(CONFIG, **change))
    name = model.config.activation_function.replace("pytorch_tanh", "new")
    reference = dataclasses.replace(model.config, activation_function=name)
    params, text = busy_params(model, 3, norm_scale=1.0), texts[3]
    run = jax.jit(lambda params, text: _states_and_logits(model, params, text))
    states, logits = run(params, text[None])
    np.testing.assert_allclose(
        states[0], hidden_by_loop(params, reference, text), rtol=1e-4, atol=1e-4
    )
    assert logits.shape == (1, 7, VOCABULARY)
    np.testing.assert_allclose(
        logits[0], logits_by_loop(params, reference, text), rtol=1e-4, atol=1e-4
    )


def _states_and_logits(model, params, tokens, mask=None):
    states = model.hidden(params, tokens, mask)
    return states, model.logits(params, states)


@pytest.mark.parametrize("junk", [0, 10, 2**30, -1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_hidden_state(side, junk, params, texts):
    tokens, mask = pad(texts, 9, side, junk)
    states = np.asarray(hidden(params, tokens, mask))
    assert np.isfinite(states).all()
    for i, text in enumerate(texts):
        alone = hidden_by_loop(params, CONFIG, text)
        np.testing.assert_allclose(states[i][mask[i]], alone, rtol=1e-4, atol=1e-4)


def test_packed_texts_do_not_see_each_other(params, texts):
    tokens, segments = np.full((2, 16), 9), np.zeros((2, 16), np.int32)
    layout = [[(0, 1), (2, 6), (3, 9)], [(1, 0), (3, 4), (0, 11)]]
    for i, places in enumerate(layout):
        for number, (text, start) in enumerate(places, start=1):
            at = slice(start, start + len(texts[text]))
            tokens[i, at], segments[i, at] = texts[text], number
    states = np.asarray(hidden(params, tokens, segments))
    assert np.isfinite(states).all()
    for i, places in enumerate(layout):
        for text, start in places:
            np.testing.assert_allclose(
                states[i, start : start + len(texts[text])],
                hidden_by_loop(params, CONFIG, texts[text]),
                rtol=1e-4,
                atol=1e-4,
            )


def test_a_token_changes_nothing_before_it(params, texts):
    text = texts[3][None]
    before = np.asarray(hidden(params, text))
    for t in range(text.shape[1]):
        changed = text.copy()
        changed[0, t] = (changed[0, t] + 1) % VOCABULARY
        after = np.asarray(hidden(params, changed))
        np.testing.assert_array_equal(after[0, :t], before[0, :t])
        assert (np.abs(after[0, t:] - before[0, t:]).max(axis=-1) > 1e-4).all()


def test_no_mask_means_that_all_is_real(params, texts):
    text = texts[3][None]
    np.testing.assert_array_equal(
        hidden(params, text), hidden(params, text, np.ones(text.shape, bool))
    )


def weighted_sum(params, tokens, mask, weights):
    states = MODEL.hidden(params, tokens, mask)
    return jnp.sum(jnp.where(mask[..., None], MODEL.logits(params, states) * weights, 0.0))


def test_padding_moves_no_gradient(params, texts):
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(4, 7, VOCABULARY)).astype(np.float32)
    gradients = jax.jit(jax.grad(weighted_sum))
    parts = []
    for i, text in enumerate(texts):
        alone = np.zeros((1, 7), np.int32)
        alone[0, : len(text)] = text
        parts.append(gradients(params, alone, np.arange(7)[None] < len(text), weights[i][None]))
    expected = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    for side, junk in (("left", 4), ("right", 2**30)):
        tokens, mask = pad([*texts, []], 9, side, junk)  # one more text, all padding
        padded = np.zeros((5, 9, VOCABULARY), np.float32)
        for i, text in enumerate(texts):
            padded[i, mask[i]] = weights[i, : len(text)]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3),
            gradients(params, tokens, mask, padded),
            expected,
        )


def test_the_vocabulary_padding_is_invisible(params, texts):
    assert params["wte"]["embedding"].shape == (128, CONFIG.n_embd)
    assert MODEL.unembedding(params).shape == (128, CONFIG.n_embd)
    poisoned = jax.tree.map(jnp.copy, params)
    poisoned["wte"]["embedding"] = params["wte"]["embedding"].at[VOCABULARY:].set(1e4)
    text, weights = jnp.asarray(texts[3][None]), jnp.ones((1, 7, VOCABULARY)).at[..., 3].set(2.0)
    mask = jnp.ones(text.shape, bool)
    run = jax.jit(jax.value_and_grad(weighted_sum))
    value, gradient = run(params, text, mask, weights)
    poisoned_value, poisoned_gradient = run(poisoned, text, mask, weights)
    np.testing.assert_array_equal(value, poisoned_value)
    jax.tree.map(np.testing.assert_array_equal, gradient, poisoned_gradient)
    table = np.asarray(gradient["wte"]["embedding"])
    np.testing.assert_array_equal(table[VOCABULARY:], 0.0)
    assert (np.abs(table[:VOCABULARY]).max(axis=1) > 0).all()


def test_padded_logits_are_the_logits_and_then_minus_infinity(params, texts):
    states = hidden(params, texts[3][None])
    padded = np.asarray(MODEL.padded_logits(params, states))
    np.testing.assert_array_equal(padded[..., :VOCABULARY], MODEL.logits(params, states))
    assert padded.shape[-1] == 128
    assert np.isneginf(padded[..., VOCABULARY:]).all()


def test_bfloat16_computes_close_to_float32(params, texts):
    model = GPT2(CONFIG, "bfloat16")
    tokens, mask = pad(texts, 8, "left", 5)
    run = jax.jit(lambda params: _states_and_logits(model, params, tokens, jnp.asarray(mask)))
    states, logits = run(params)
    assert states.dtype == jnp.bfloat16
    assert model.init_cache(1, 2).keys.dtype == jnp.bfloat16
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    expected = MODEL.logits(params, hidden(params, tokens, mask))
    error = np.abs(np.asarray(logits - expected))[mask]
    assert 1e-4 < error.max() < 0.1 * np.abs(np.asarray(expected)[mask]).max()


def test_equal_models_share_a_trace(params, texts):
    traces = []

    def states(model, params, tokens):
        traces.append(model)
        return model.hidden(params, tokens)

    run = jax.jit(states, static_argnums=0)
    for dtype in ("float32", jnp.float32, np.dtype("float32")):
        model = GPT2(dataclasses.replace(CONFIG), dtype)
        assert (model, hash(model)) == (MODEL, hash(MODEL))
        run(model, params, texts[3][None])
    assert len(traces) == 1
    run(GPT2(CONFIG, "bfloat16"), params, texts[3][None])
    assert len(traces) == 2


def test_positions_count_the_real_tokens_of_a_segment():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    positions = np.asarray(positions_from(jnp.asarray(mask)))
    assert positions.dtype == np.int32
    assert (positions >= 0).all()
    assert (positions < 5).all()
    for i in range(4):
        for t in np.flatnonzero(mask[i]):
            assert positions[i, t] == mask[i, :t].sum()
    segments = np.array([[1, 1, 2, 2, 2, 0], [0, 1, 2, 2, 0, 3], [0, 0, 0, 0, 0, 0]])
    positions = np.asarray(positions_from(jnp.asarray(segments)))
    for i, t in zip(*np.nonzero(segments), strict=True):
        assert positions[i, t] == (segments[i, :t] == segments[i, t]).sum()
