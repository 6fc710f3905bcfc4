"""GPT-2: against a forward pass by loops, and the many ways of running it against one another."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.interface import SharedPrompt, positions_from
from tests.models.gpt2_by_loop import hidden_by_loop, logits_by_loop

CONFIG = GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
MODEL = GPT2(CONFIG)
VOCABULARY = CONFIG.vocab_size

hidden = jax.jit(MODEL.hidden)


def busy_params(model, seed=0):
    """Parameters in which everything matters: biases, scales and sharp attention included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)
    for norm in (params["ln_f"], params["layers"]["ln_1"], params["layers"]["ln_2"]):
        norm["scale"] += 1.0
    table = params["wte"]["embedding"]
    params["wte"]["embedding"] = table.at[model.config.vocab_size :].set(0.0)
    return params


@pytest.fixture(scope="module")
def params():
    return busy_params(MODEL)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, size=n) for n in (5, 1, 3, 7)]


def pad(texts, width, side, junk):
    """(tokens, mask) of texts padded with token ids that mean nothing."""
    tokens, mask = np.full((len(texts), width), junk), np.zeros((len(texts), width), bool)
    for row, text in enumerate(texts):
        at = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        tokens[row, at], mask[row, at] = text, True
    return tokens, mask


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
    params, text = busy_params(model, seed=3), texts[3]
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
    for row, text in enumerate(texts):
        alone = hidden_by_loop(params, CONFIG, text)
        np.testing.assert_allclose(states[row][mask[row]], alone, rtol=1e-4, atol=1e-4)


def test_packed_texts_do_not_see_each_other(params, texts):
    tokens, segments = np.full((2, 16), 9), np.zeros((2, 16), np.int32)
    layout = [[(0, 1), (2, 6), (3, 9)], [(1, 0), (3, 4), (0, 11)]]
    for row, places in enumerate(layout):
        for number, (text, start) in enumerate(places, start=1):
            at = slice(start, start + len(texts[text]))
            tokens[row, at], segments[row, at] = texts[text], number
    states = np.asarray(hidden(params, tokens, segments))
    assert np.isfinite(states).all()
    for row, places in enumerate(layout):
        for text, start in places:
            np.testing.assert_allclose(
                states[row, start : start + len(texts[text])],
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
    for row, text in enumerate(texts):
        alone = np.zeros((1, 7), np.int32)
        alone[0, : len(text)] = text
        parts.append(gradients(params, alone, np.arange(7)[None] < len(text), weights[row][None]))
    expected = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    for side, junk in (("left", 4), ("right", 2**30)):
        tokens, mask = pad([*texts, []], 9, side, junk)  # one row more, all padding
        padded = np.zeros((5, 9, VOCABULARY), np.float32)
        for row, text in enumerate(texts):
            padded[row, mask[row]] = weights[row, : len(text)]
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

    @jax.jit
    def both(params):
        x = MODEL.embed(params, tokens[:, :7], positions[:, :7])
        room = MODEL.init_cache(4, 9)
        _, cache = MODEL.layers(params["layers"], x, mask[:, :7], positions[:, :7], room)
        found = []
        for parts in ((params, cache), MODEL.for_decoding(params, cache)):
            (weights, memory), states = parts, []
            for t in (7, 8):
                at = slice(t, t + 1)
                x = MODEL.embed(weights, tokens[:, at], positions[:, at])
                x, memory = MODEL.layers(
                    weights["layers"], x, mask[:, at], positions[:, at], memory
                )
                states.append(MODEL.final(weights, x))
            found.append((states, [*memory.keys], [*memory.values], memory.mask, memory.length))
        assert isinstance(memory.keys, tuple)
        return found

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *both(params))


def test_padded_logits_are_the_logits_and_then_minus_infinity(params, texts):
    states = hidden(params, texts[3][None])
    padded = np.asarray(MODEL.padded_logits(params, states))
    np.testing.assert_array_equal(padded[..., :VOCABULARY], MODEL.logits(params, states))
    assert padded.shape[-1] == 128
    assert np.isneginf(padded[..., VOCABULARY:]).all()


@pytest.mark.parametrize("pieces", [(4, 1, 1, 1, 1, 1), (3, 2, 4), (9,)], ids=str)
def test_decoding_with_a_cache_equals_the_whole(pieces, params, texts):
    tokens, mask = pad(texts, 9, "left", 5)
    mask[3, 8] = False  # a response that has ended
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    run = jax.jit(run_with_cache, static_argnums=(0, 4))
    states, cache = run(MODEL, params, tokens, mask, pieces)
    whole = np.asarray(hidden(params, tokens, mask))
    real = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(states)[real], whole[real], rtol=1e-4, atol=1e-4)
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
    """[B * K, T, D]: each prompt and its responses in one row."""
    batch, width = prompts.shape
    count = responses.shape[0] // batch
    lengths = jnp.repeat(prompt_mask.sum(axis=1), count)[:, None]
    positions = jnp.concatenate(
        [positions_from(prompt_mask), (positions_from(mask) + lengths).reshape(batch, -1)], axis=1
    )
    tokens = jnp.concatenate([prompts, responses.reshape(batch, -1)], axis=1)
    whole_mask = jnp.concatenate([prompt_mask, mask.reshape(batch, -1)], axis=1)
    x = MODEL.embed(params, tokens, positions)
    shared = SharedPrompt(width, count)
    x, cache = MODEL.layers(params["layers"], x, whole_mask, positions, shared=shared)
    assert cache is None
    return MODEL.final(params, x[:, width:].reshape(*responses.shape, -1))


def states_repeated(params, prompts, prompt_mask, responses, mask):
    """[B * K, T, D]: each prompt run K times, in front of each of its responses."""
    count = responses.shape[0] // prompts.shape[0]
    prompts, prompt_mask = (np.repeat(x, count, axis=0) for x in (prompts, prompt_mask))
    tokens = jnp.concatenate([prompts, responses], axis=1)
    states = MODEL.hidden(params, tokens, jnp.concatenate([prompt_mask, mask], axis=1))
    return states[:, prompts.shape[1] :]


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


@pytest.mark.parametrize("unfrozen", range(4))
def test_split_halves_run_one_after_the_other_and_merge(unfrozen, texts):
    model = GPT2(dataclasses.replace(CONFIG, n_layer=3))
    params = busy_params(model)
    frozen, trained = model.split(params, unfrozen)
    assert set(trained) == {"layers", "ln_f"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trained["layers"])} == {unfrozen}
    merged = model.merge(frozen, trained)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    tokens, mask = (jnp.asarray(x) for x in pad(texts, 8, "left", 5))
    positions = positions_from(mask)

    @jax.jit
    def halves(frozen, trained):
        x = model.embed(frozen, tokens, positions)
        x, _ = model.layers(frozen["layers"], x, mask, positions)
        x, _ = model.layers(trained["layers"], x, mask, positions)
        return model.final(trained, x)

    whole = jax.jit(model.hidden)(params, tokens, mask)
    np.testing.assert_allclose(halves(frozen, trained), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unfrozen", [-1, 3])
def test_split_refuses_more_layers_than_there_are(unfrozen, params):
    with pytest.raises(InputError, match=f"from 0 to n_layer = 2, but is {unfrozen}"):
        MODEL.split(params, unfrozen)


RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@pytest.mark.parametrize("name", RATES)
def test_each_dropout_needs_a_key_and_its_own_rate(name, params, texts):
    model = GPT2(dataclasses.replace(CONFIG, **(dict.fromkeys(RATES, 0.0) | {name: 0.5})))
    run = jax.jit(lambda key: model.hidden(params, texts[3][None], dropout_key=key))
    plain = hidden(params, texts[3][None])
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    for a, b in itertools.combinations((plain, first, other), 2):
        assert np.abs(a - b).max() > 1e-2


def test_a_dropout_key_without_rates_changes_nothing(params, texts):
    model = GPT2(dataclasses.replace(CONFIG, **dict.fromkeys(RATES, 0.0)))
    run = jax.jit(lambda key: model.hidden(params, texts[3][None], dropout_key=key))
    states = run(jax.random.key(0))
    np.testing.assert_allclose(states, hidden(params, texts[3][None]), rtol=1e-5, atol=1e-5)


def test_dropout_differs_between_layers():
    # Layers that add ones to nothing: what is left after dropout tells which of them were dropped.
    config = dataclasses.replace(CONFIG, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.5)
    model = GPT2(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    layers = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["layers"])
    layers["mlp"]["c_proj"]["bias"] += jnp.array([[1.0], [4.0]])
    x, mask = jnp.zeros((8, 4, 16)), jnp.ones((8, 4), bool)
    run = jax.jit(lambda key: model.layers(layers, x, mask, positions_from(mask), dropout_key=key))
    out, _ = run(jax.random.key(0))
    counts = collections.Counter(np.asarray(out).ravel().tolist())
    assert set(counts) == {0.0, 2.0, 8.0, 10.0}
    assert min(counts.values()) > 0.15 * out.size


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


def test_init_has_the_published_scales():
    config = GPT2Config(vocab_size=300, n_positions=128, n_embd=64, n_layer=4, n_head=2)
    params = jax.jit(GPT2(config).init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    layers = params["layers"]
    small = 0.02 / 8**0.5
    for kernel, scale in (
        (params["wte"]["embedding"][:300], 0.02),
        (params["wpe"]["embedding"], 0.02),
        (layers["attn"]["c_attn"]["kernel"], 0.02),
        (layers["attn"]["c_proj"]["kernel"], small),
        (layers["mlp"]["c_fc"]["kernel"], 0.02),
        (layers["mlp"]["c_proj"]["kernel"], small),
    ):
        assert float(jnp.std(kernel)) == pytest.approx(scale, rel=0.05)
    assert params["wte"]["embedding"].shape == (384, 64)
    np.testing.assert_array_equal(params["wte"]["embedding"][300:], 0.0)
    kernels = np.asarray(layers["attn"]["c_attn"]["kernel"])
    for a, b in itertools.combinations(range(4), 2):
        assert np.abs(kernels[a] - kernels[b]).max() > 0.01
    for leaf in jax.tree.leaves(
        [params["ln_f"]["bias"], *(layers[name]["bias"] for name in ("ln_1", "ln_2"))]
    ):
        np.testing.assert_array_equal(leaf, 0.0)
    np.testing.assert_array_equal(layers["ln_1"]["scale"], np.ones((4, 64)))


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)]
)
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert GPT2Config(vocab_size=vocab_size).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer must be at least 1, but is 0"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, but is -1"),
        ({"n_embd": 10, "n_head": 4}, "n_embd must be a multiple of n_head, but 10"),
        ({"activation_function": "swish"}, "'swish' is unknown; known are gelu, gelu_new"),
    ],
    ids=str,
)
def test_a_wrong_configuration_says_what_is_allowed(change, message):
    with pytest.raises(InputError, match=message):
        GPT2Config(**change)


def test_positions_count_the_real_tokens_of_a_segment():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    positions = np.asarray(positions_from(jnp.asarray(mask)))
    assert positions.dtype == np.int32
    assert (positions >= 0).all()
    assert (positions < 5).all()
    for row in range(4):
        for t in np.flatnonzero(mask[row]):
            assert positions[row, t] == mask[row, :t].sum()
    segments = np.array([[1, 1, 2, 2, 2, 0], [0, 1, 2, 2, 0, 3], [0, 0, 0, 0, 0, 0]])
    positions = np.asarray(positions_from(jnp.asarray(segments)))
    for row, t in zip(*np.nonzero(segments), strict=True):
        assert positions[row, t] == (segments[row, :t] == segments[row, t]).sum()
