"""Generation with caches that keep a window, against full sequences without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.cache import Cache
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_readers import read_config
from rlhf_jax.models.interface import positions_from
from rlhf_jax.rollout import generate
from tests.models.decoder_by_loop import logits_by_loop
from tests.versions import newest

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "sliding_window": 5,  # does not divide the width of the prompts
    "query_pre_attn_scalar": 8,
}
CONFIGS = {
    "alternating": {"model_type": "gemma2", "num_hidden_layers": 3},
    "5 to 1": {"model_type": "gemma3_text", "num_hidden_layers": 7},
    "without RoPE": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "layer_types": [FULL, FULL, SLIDING, FULL],
        "no_rope_layers": [1, 0, 1, 1],
    },
    "all sliding": {"model_type": "mistral", "num_hidden_layers": 2},
}
LENGTHS, WIDTH, NEW = (2, 9, 12), 12, 10  # prompts shorter and longer than the window
rng = np.random.default_rng(0)
TEXTS = [rng.integers(2, 19, length) for length in LENGTHS]
PROMPTS = np.stack([np.pad(text, (WIDTH - len(text), 0)) for text in TEXTS])
MASK = np.arange(WIDTH) >= WIDTH - np.array(LENGTHS)[:, None]


def model_of(case, **changes):
    config = read_config({**SIZES, **CONFIGS[case]})
    return Decoder(dataclasses.replace(config, **changes))


def busy(model):
    """Parameters whose norms are not the identity."""
    rng = np.random.default_rng(1)
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    return tree.unflatten([x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


@pytest.mark.parametrize(
    ("name", "most_unstacked", "remat", "temperature"),
    [
        ("alternating", 0, "full", 1.0),
        ("5 to 1", 48, "dots", 0.0),
        *newest(
            ("5 to 1", 0, "full", 1.0),
            ("without RoPE", 0, "dots", 1.0),
            ("all sliding", 0, "full", 1.0),
        ),
    ],
)
def test_generation_equals_texts_without_a_cache(
    name, most_unstacked, remat, temperature, monkeypatch
):
    """Left-padded prompts: samples from a stack, and greedy tokens from layers one by one."""
    params = busy(model_of(name))
    monkeypatch.setattr("rlhf_jax.models.stacked.MAX_UNSTACKED_LAYERS", most_unstacked)
    model = dataclasses.replace(model_of(name), remat=remat)

    @jax.jit
    def run(params):
        prompts = jnp.asarray(PROMPTS), jnp.asarray(MASK), jax.random.key(2)
        settings = {"max_new_tokens": NEW, "temperature": temperature}
        return generate(model, params, *prompts, **settings)

    rollout = run(params)
    for text, response, actual in zip(TEXTS, rollout.tokens, rollout.logprobs, strict=True):
        tokens = np.concatenate([text, response])
        logits = logits_by_loop(model.config, params, tokens)[len(text) - 1 : -1]
        if not temperature:
            np.testing.assert_array_equal(response, logits.argmax(-1))
            continue
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(actual, logprobs[np.arange(NEW), response], atol=1e-5, rtol=0)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "cut"), [("alternating", 0), ("alternating", 1), ("alternating", 2), ("5 to 1", 2)]
)
def test_halves_of_a_stack_have_caches_of_their_own(name, cut):
    """The prompts, one token, then two at once: one takes the slot that the other one reads."""
    model = model_of(name)
    params = busy(model)
    tokens, mask = (np.concatenate([x, x[:, -3:]], axis=1) for x in (PROMPTS, MASK))
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    positions = positions_from(mask)

    @jax.jit
    def run(params):
        lower, upper = model.split(params, model.config.n_layer - cut)
        halves = [(lower["layers"], 0), (upper["layers"], cut)]
        caches, states = [model.init_cache(3, 15) for _ in halves], []
        for start, stop in ((0, 12), (12, 13), (13, 15)):
            part = mask[:, start:stop], positions[:, start:stop]
            x = model.embed(params, tokens[:, start:stop], part[1])
            for i, (stack, first) in enumerate(halves):
                x, caches[i] = model.layers(stack, x, *part, caches[i], first_layer=first)
            states.append(model.final(params, x))
        return jnp.concatenate(states, axis=1), model.hidden(params, tokens, mask)

    actual, expected = run(params)
    np.testing.assert_allclose(actual[mask], expected[mask], atol=2e-5)


def sizes(cache: Cache):
    """Bytes of keys and values."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.memories))


def test_the_cache_of_sliding_layers_has_the_length_of_the_window():
    """Gemma 3 1B: 26 layers, of which each sixth one is full, and one head of width 256."""
    config = read_config(
        {
            **SIZES,
            "model_type": "gemma3_text",
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "max_position_embeddings": 32768,
        }
    )
    model = Decoder(config, dtype="bfloat16")
    batch, position = 4, 2 * 256 * 2  # keys and values of bfloat16
    for length in (2048, 512, 100):
        cache = jax.eval_shape(lambda length=length: model.init_cache(4, length))
        assert sizes(cache) == batch * position * (4 * length + 22 * min(512, length))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def prefill(params, prompts, mask):
        cache, positions = model.init_cache(batch, 2048), positions_from(mask)
        x = model.embed(params, prompts, positions)
        return model.layers(params["layers"], x, mask, positions, cache)[1]

    shape = (batch, 1536)
    arguments = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))
    filled = jax.eval_shape(prefill, params, *arguments)
    assert sizes(filled) == batch * position * (4 * 2048 + 22 * 512)
    assert filled.sliding_keys.shape == (22, batch, 1, 512, 256)


@pytest.mark.newest
def test_a_slot_is_read_while_its_position_is_in_the_window():
    """The content of slots that were not written yet changes nothing."""
    model = model_of("alternating")
    params = busy(model)
    tokens, mask = jnp.full((1, 3), 5), jnp.ones((1, 3), bool)
    positions = positions_from(mask)

    def last(poison):
        x = model.embed(params, tokens, positions)
        cache = model.init_cache(1, 9)
        _, cache = model.layers(params["layers"], x[:, :2], mask[:, :2], positions[:, :2], cache)
        cache = cache._replace(
            sliding_keys=cache.sliding_keys.at[:, :, :, 2:].set(poison),
            sliding_values=cache.sliding_values.at[:, :, :, 2:].set(poison),
        )
        return model.layers(params["layers"], x[:, 2:], mask[:, 2:], positions[:, 2:], cache)[0]

    np.testing.assert_array_equal(last(0.0), last(1e4))
