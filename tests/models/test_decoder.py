"""Decoders whose layers are of several kinds, in every way that the library runs layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import Sequences
from rlhf_jax.errors import InputError
from rlhf_jax.models import load_reward_model, save_pretrained, save_reward_model
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.decoder_families import FAMILIES
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.huggingface import fresh_model, load_pretrained
from rlhf_jax.models.interface import positions_from
from rlhf_jax.models.rope import Rope
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.rollout import generate
from rlhf_jax.rollout.score import end_scores, frozen_states, response_logprobs
from rlhf_jax.training.reward import init_state, normalize_scores
from rlhf_jax.training.reward_settings import Settings

SLIDING, FULL = "sliding_attention", "full_attention"
CONFIG = DecoderConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    initializer_range=0.4,
    tie_word_embeddings=True,
    qk_norm="head",
    layer_types=(SLIDING, SLIDING, FULL, SLIDING),
    sliding_window=3,
    sliding_rope=Rope(100.0),
    no_rope_layers=(1, 0, 1, 1),
    attention_softcap=4.0,
    logit_softcap=6.0,
    pad_token_id=0,
    eos_token_id=1,
)
MODEL = Decoder(CONFIG)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0))
rng = np.random.default_rng(0)
PROMPTS = rng.integers(2, 19, (2, 6))
PROMPT_MASK = np.array([[False, False, True, True, True, True], [True] * 6])
RESPONSES = rng.integers(2, 19, (2, 3, 5))
RESPONSE_MASK = np.arange(5) < np.array([[5, 2, 4], [1, 5, 5]])[..., None]
SHARED = Sequences(PROMPTS, PROMPT_MASK, RESPONSES, RESPONSE_MASK)


def alone(values):
    """Each response with a copy of its prompt."""
    prompts, mask = (np.repeat(x, 3, axis=0) for x in values[:2])
    return Sequences(prompts, mask, *(x.reshape(6, 5) for x in values[2:]))


@pytest.fixture(scope="module")
def expected():
    """Log-probabilities of the responses by full passes over each text."""
    sequences = alone(SHARED)
    tokens = np.concatenate([sequences.prompts, sequences.tokens], axis=1)
    mask = np.concatenate([sequences.prompt_mask, sequences.mask], axis=1)
    logits = jax.jit(lambda p: MODEL.logits(p, MODEL.hidden(p, tokens, mask)))(PARAMS)
    logprobs = jax.nn.log_softmax(logits)[:, 5:-1]
    picked = jnp.take_along_axis(logprobs, sequences.tokens[..., None], axis=-1)[..., 0]
    return picked.reshape(2, 3, 5)


@pytest.mark.parametrize("unfrozen", [None, 4, 3, 1, 0])
def test_shared_prompts_and_any_cut_equal_a_full_pass(expected, unfrozen):
    """The window reaches from a response into its prompt, and the kinds stay with their layers."""

    @jax.jit
    def run(params):
        frozen = states = None
        if unfrozen is not None:
            frozen, params = MODEL.split(params, unfrozen)
            states = frozen_states(MODEL, frozen, SHARED)
        return response_logprobs(
            MODEL, params, SHARED, temperature=1.0, frozen=frozen, states=states
        )[0]

    actual = run(PARAMS)
    np.testing.assert_allclose(actual[RESPONSE_MASK], expected[RESPONSE_MASK], atol=2e-5)


def test_a_window_hides_what_is_farther_away():
    """With sliding layers alone, a token reads at most layers * (window - 1) tokens back."""
    kinds = {"layer_types": (SLIDING,) * 2, "no_rope_layers": ()}
    model = Decoder(dataclasses.replace(CONFIG, num_hidden_layers=2, **kinds))
    params = model.init(jax.random.key(1))
    tokens = rng.integers(2, 19, (1, 9))
    changed = tokens.copy()
    changed[0, 2] += 1 if changed[0, 2] < 18 else -1
    run = jax.jit(lambda tokens: model.hidden(params, tokens))
    differs = np.abs(run(tokens) - run(changed)).max(-1)[0] > 0
    np.testing.assert_array_equal(differs, [False] * 2 + [True] * 5 + [False] * 2)


def test_packed_texts_equal_texts_alone():
    texts = [rng.integers(2, 19, length) for length in (5, 7, 3)]
    tokens = np.concatenate(texts)[None]
    segments = np.repeat([1, 2, 3], [5, 7, 3])[None]
    packed = jax.jit(MODEL.hidden)(PARAMS, tokens, segments)
    start = 0
    for text in texts:
        one = MODEL.hidden(PARAMS, text[None])
        np.testing.assert_allclose(packed[:, start : start + len(text)], one, atol=2e-5)
        start += len(text)


@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
def test_decoding_beyond_the_window_equals_a_full_pass(layout, monkeypatch):
    monkeypatch.setattr(
        "rlhf_jax.models.stacked.MAX_UNSTACKED_LAYERS", 16 if layout == "unstacked" else 0
    )

    @jax.jit
    def run(params):
        return generate(MODEL, params, PROMPTS, PROMPT_MASK, jax.random.key(2), max_new_tokens=7)

    rollout = run(PARAMS)
    tokens = np.concatenate([PROMPTS, rollout.tokens], axis=1)
    mask = np.concatenate([PROMPT_MASK, rollout.mask], axis=1)
    hidden = MODEL.hidden(PARAMS, tokens, mask)
    logprobs = jax.nn.log_softmax(MODEL.logits(PARAMS, hidden))[:, 5:-1]
    picked = jnp.take_along_axis(logprobs, rollout.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(rollout.logprobs, picked, atol=2e-5)


def test_a_prefix_in_a_cache_is_seen_through_the_window(expected):
    positions = positions_from(PROMPT_MASK)
    x = MODEL.embed(PARAMS, PROMPTS, positions)
    cache = MODEL.init_cache(2, 6)
    last, cache = MODEL.layers(PARAMS["layers"], x, PROMPT_MASK, positions, cache)
    tokens, mask = RESPONSES.reshape(6, 5), RESPONSE_MASK.reshape(6, 5)
    own = positions_from(mask) + jnp.repeat(positions[:, -1:] + 1, 3, axis=0)
    x = MODEL.embed(PARAMS, tokens, own)
    x, _ = MODEL.layers(PARAMS["layers"], x, mask, own, prefix=cache)
    last = jnp.repeat(last[:, -1:], 3, axis=0)
    states = MODEL.final(PARAMS, jnp.concatenate([last, x[:, :-1]], axis=1))
    logprobs = jax.nn.log_softmax(MODEL.logits(PARAMS, states))
    picked = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0].reshape(2, 3, 5)
    np.testing.assert_allclose(picked[RESPONSE_MASK], expected[RESPONSE_MASK], atol=2e-5)


def test_an_untied_unembedding_freezes_with_the_lower_layers():
    model = Decoder(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    params = model.init(jax.random.key(0))
    frozen, trained = model.split(params, 2)
    assert set(trained) == {"layers", "norm"}
    assert set(frozen) == {"embed_tokens", "layers", "lm_head"}
    np.testing.assert_array_equal(model.unembedding(params), params["lm_head"]["embedding"])


@pytest.mark.newest
def test_gpt2_with_an_untied_unembedding(tmp_path):
    config = GPT2Config(11, 8, 8, 1, 1, tie_word_embeddings=False)
    model = GPT2(config)
    params = model.init(jax.random.key(0))
    assert not np.array_equal(params["lm_head"]["embedding"], params["wte"]["embedding"])
    save_pretrained(tmp_path, model, params)
    again, same = load_pretrained(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, same)
    rollout = generate(
        model, params, PROMPTS[:, :4] % 11, PROMPT_MASK[:, 2:], jax.random.key(0), max_new_tokens=2
    )
    assert rollout.mask.all()


@pytest.mark.parametrize("tied", [True, False])
def test_reward_models_without_a_bias_in_the_final_norm(tied, tmp_path, caplog):
    """The shift of normalized scores is a number beside the weights."""
    model = fresh_model(
        ModelSettings(n_layer=1, n_embd=16, n_head=2, n_positions=16, dropout=0.0),
        vocab_size=19,
        pad_token_id=0,
        eos_token_id=1,
        model_type="llama",
    )
    if not tied:
        model = dataclasses.replace(
            model, config=dataclasses.replace(model.config, tie_word_embeddings=False)
        )
    params = model.init(jax.random.key(0))
    state = init_state(model, params, Settings(num_layers_unfrozen=None), jax.random.key(1))
    assert set(state.params["head"]) == {"kernel", "bias"}
    assert "lm_head" not in state.params["model"]  # a reward model has no use for it
    before = end_scores(model, state.params, SHARED)
    normalized = normalize_scores(model, state.params, 0.3, 2.0)
    np.testing.assert_allclose(end_scores(model, normalized, SHARED), (before - 0.3) / 2, atol=1e-5)
    save_reward_model(tmp_path, model, normalized)
    assert "score_bias" in caplog.text
    loaded, again = load_reward_model(tmp_path)
    assert again["head"].keys() == normalized["head"].keys()
    np.testing.assert_array_equal(
        end_scores(loaded, again, SHARED), end_scores(model, normalized, SHARED)
    )


def test_fresh_models_of_every_family():
    settings = ModelSettings(n_layer=2, n_embd=32, n_head=2, n_positions=16)
    for family in (family.model_type for family in FAMILIES):
        model = fresh_model(settings, vocab_size=20, model_type=family)
        assert (model.config.model_type, model.config.n_layer) == (family, 2)
    with pytest.raises(InputError, match="'llama5', but only 'gpt2', 'llama'"):
        fresh_model(settings, vocab_size=20, model_type="llama5")
