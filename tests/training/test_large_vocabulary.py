"""Steps of models with a large vocabulary: no array of all logits, and the results of one."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.batches import PromptBatch, Rollout, TextBatch
from rlhf_jax.models import readout
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.runtime.evaluation.teacher_forced import make_predict_step
from rlhf_jax.training import ppo, sft

CONFIG = DecoderConfig(
    vocab_size=150,  # and padding up to 256
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
    initializer_range=0.4,
    tie_word_embeddings=True,
    logit_softcap=3.0,
    logit_divisor=0.8,
)
SGD = optax.sgd(1.0)
KEY = jax.random.key(0)
BATCH, PROMPT, RESPONSE = 4, 3, 9


def text_batch(vocab_size):
    rng = np.random.default_rng(0)
    segments = (np.arange(12) < np.array([12, 5, 9, 12])[:, None]).astype(np.int32)
    tokens = rng.integers(0, vocab_size, segments.shape)
    return TextBatch(tokens, segments, segments > 0)


def sft_parts(model):
    """(init, step, batch) of fine-tuning with all terms of the loss."""
    settings = sft.Settings(batch_size=BATCH, dropout=False, label_smoothing=0.1, z_loss=0.01)
    init = functools.partial(sft.init_state, model, settings=settings, key=KEY, optimizer=SGD)
    return init, sft.make_step(model, settings, optimizer=SGD), text_batch(150)


def ppo_parts(model, unfrozen=None):
    """(init, step, batch) of the updates on given responses; the batch holds these and scores."""
    rng = np.random.default_rng(1)
    settings = ppo.Settings(
        batch_size=BATCH,
        num_mini_batches=1,  # ratios of a second update magnify rounding
        num_ppo_epochs=1,
        response_length=RESPONSE,
        temperature=0.7,
        entropy_coef=0.1,
        num_layers_unfrozen=unfrozen,
    )
    init = functools.partial(ppo.init_state, model, settings=settings, key=KEY, optimizer=SGD)
    update = ppo.make_update_step(model, settings, optimizer=SGD)
    mask = np.arange(RESPONSE) < np.array([9, 4, 1, 7])[:, None]
    tokens = np.where(mask, rng.integers(0, 150, mask.shape), 0)
    prompts = rng.integers(0, 150, (BATCH, PROMPT)), np.ones((BATCH, PROMPT), bool)
    rollout = Rollout(tokens, mask, np.zeros(mask.shape, np.float32))
    scores = rng.normal(size=BATCH).astype(np.float32)

    def step(state, batch, key):
        return update(state, *batch, key)[:2]

    return init, step, (PromptBatch(*prompts, np.arange(BATCH)), rollout, scores)


STEPS = {
    "sft": sft_parts,
    "ppo": ppo_parts,
    "ppo above frozen layers": lambda model: ppo_parts(model, 1),
}


def assert_near(actual, expected):
    """Within 1e-4 of the largest element."""
    scale = max(1.0, float(np.max(np.abs(expected))))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.newest
@pytest.mark.parametrize("name", ["sft", "ppo above frozen layers"])
def test_a_step_without_all_logits_equals_one_with_them(name, monkeypatch):
    """Metrics, and gradients: one update of plain gradient descent moves parameters by them."""
    model = Decoder(CONFIG)
    init, step, batch = STEPS[name](model)
    state = init(model.init(KEY))
    expected = jax.jit(step)(state, batch, KEY)
    monkeypatch.setattr(readout, "LINEAR_VOCABULARY", 150)
    result = jax.jit(lambda *arguments: step(*arguments))(state, batch, KEY)
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), expected[1]))
    jax.tree.map(assert_near, result, expected)


def sizes(jaxpr):
    """The shapes of all arrays that a program makes, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars if hasattr(x.aval, "shape"))
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


def largest_logits(program, *arguments):
    """Vectors of the vocabulary's length in the largest array of the program that has such ones."""
    vocabulary = 151_936
    shapes = set(sizes(jax.make_jaxpr(lambda *each: program(*each))(*arguments).jaxpr))
    blocks = [s for s in shapes if vocabulary in (*s, int(np.prod(s[-2:])))]
    tables = {(vocabulary, 16), (16, vocabulary)}
    return max(int(np.prod(s)) // vocabulary for s in blocks if s not in tables)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "tokens"), [("sft", 4 * 11), ("ppo", 4 * 9), ("evaluation", 4 * 12)]
)
def test_no_array_has_the_logits_of_all_tokens(name, tokens, monkeypatch):
    """`tokens` are those that a loss or an evaluation of a batch reads."""
    model = Decoder(dataclasses.replace(CONFIG, vocab_size=151_936))
    params = jax.eval_shape(model.init, KEY)
    if name == "evaluation":
        program, arguments = make_predict_step(model), (params, text_batch(150))
    else:
        init, program, batch = STEPS[name](model)
        arguments = (jax.eval_shape(init, params), batch, KEY)
    assert largest_logits(program, *arguments) <= tokens * 2 / 3
    monkeypatch.setattr(readout, "LINEAR_VOCABULARY", 10**9)
    if name != "evaluation":
        assert largest_logits(program, *arguments) >= tokens
