"""FLOPs against counts by hand, and against those that the utilization of a device is of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import PairBatch, PromptBatch, TextBatch
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.rollout.generation import generate
from rlhf_jax.runtime.compilation.flops import count_flops
from rlhf_jax.training import ppo, reward, sft
from rlhf_jax.training.flops import offline_flops, online_flops, target_share
from tests.versions import newest

MODEL = GPT2(GPT2Config(vocab_size=60, n_positions=16, n_embd=8, n_layer=3, n_head=2), remat="none")


def test_a_loop_counts_as_often_as_it_runs_and_of_a_condition_the_greatest_branch():
    def f(x):
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
        return jax.lax.while_loop(
            lambda carry: carry[0] < 7, lambda carry: (carry[0] + 1, carry[1] @ x), (0, x)
        )

    jaxpr = jax.make_jaxpr(f)(jnp.ones((64, 64)))
    assert count_flops(jaxpr) == (5 + 2 + 7) * 2 * 64**3


def test_a_program_over_a_mesh_counts_on_all_of_its_devices():
    kinds, split = (jax.sharding.AxisType.Auto,), jax.P("data")
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=kinds)
    function = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(split, jax.P()), out_specs=split)
    jaxpr = jax.make_jaxpr(function)(jnp.ones((8, 2)), jnp.ones((2, 3)))
    assert count_flops(jaxpr) == 2 * 8 * 2 * 3


def test_flops_of_training_are_three_times_those_of_a_forward_pass():
    settings = sft.Settings(batch_size=4, dropout=False)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: sft.init_state(MODEL, MODEL.init(key), settings, key))
    tokens = jnp.zeros((4, 16), jnp.int32)
    batch = TextBatch(tokens, tokens, tokens > 0)
    flops = count_flops(jax.make_jaxpr(sft.make_step(MODEL, settings))(state, batch, key))
    batch_size, length, width = 4, 16, 8
    layer = 2 * batch_size * length * 12 * width**2
    attention = 2 * batch_size * length**2 * width  # one of two products forwards, five backwards
    logits = 2 * batch_size * (length - 1) * 128 * width  # the vocabulary is padded
    biases = 2 * batch_size * length * 9 * width  # their gradients on one CPU: products with ones
    assert flops == 3 * (3 * layer + logits + biases) + 3 * 7 * attention


def test_flops_of_decoding_count_every_step():
    prompts = jnp.ones((2, 4), jnp.int32)

    def f(params):
        mask = prompts > 0
        return generate(MODEL, params, prompts, mask, jax.random.key(0), max_new_tokens=8)

    flops = count_flops(jax.make_jaxpr(f)(jax.eval_shape(MODEL.init, jax.random.key(0))))
    per_token = 2 * 2 * (3 * 12 * 8**2)
    logits = 2 * 2 * 128 * 8
    # Attention: of the prompt, and of each decoded token to the 11 positions of the cache.
    attention = 3 * 2 * 2 * (8 * 2 * 8 * 11 + 2 * 4 * 4 * 8)
    assert flops == (4 + 8) * per_token + (1 + 8) * logits + attention


# Two query heads read each key/value head. One layer of three sees a window, which saves nothing:
# attention multiplies all pairs of a block.
TIED = DecoderConfig(
    vocab_size=100,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=16,
    tie_word_embeddings=True,
    qk_norm="head",
    layer_types=("sliding_attention", "full_attention", "full_attention"),
    sliding_window=3,
)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False)
QUERIES, KEYS_AND_VALUES, OUTPUT, GATED = 24 * 40, 2 * 24 * 20, 40 * 24, 3 * 24 * 40
DECODER_LAYER = 2 * (QUERIES + KEYS_AND_VALUES + OUTPUT + GATED)
DECODER_TABLE = 2 * 128 * 24


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_flops_of_a_decoder_by_hand_and_in_the_program(config):
    """Logits of 5 of 16 positions."""
    model, key = Decoder(config, remat="none"), jax.random.key(0)
    settings = sft.Settings(batch_size=4, dropout=False)
    state = jax.eval_shape(lambda: sft.init_state(model, model.init(key), settings, key))
    tokens = np.ones((4, 16), np.int32)
    positions = np.tile(np.arange(11, 16), (4, 1))
    batch = TextBatch(tokens, tokens, np.arange(16) >= tokens * 11, positions)
    share = target_share(batch)
    assert share == 5 / 16
    expected = 4 * 16 * 3 * DECODER_LAYER + 4 * 5 * DECODER_TABLE
    assert offline_flops(model, state, target_share=share) * 4 * 16 == 3 * expected
    attention = 3 * 7 * 2 * 4 * 16**2 * 4 * 10  # two products forwards, five backwards
    flops = count_flops(jax.make_jaxpr(sft.make_step(model, settings))(state, batch, key))
    assert flops == 3 * expected + attention


def test_a_reward_model_of_a_decoder_reads_no_table():
    model, key = Decoder(UNTIED, remat="none"), jax.random.key(0)
    settings = reward.Settings(batch_size=4)
    state = jax.eval_shape(lambda: reward.init_state(model, model.init(key), settings, key))
    layers = 3 * DECODER_LAYER + 2 * 24  # and the head
    assert offline_flops(model, state, target_share=0.0) == 3 * layers
    tokens, mask = np.ones((4, 5), np.int32), np.ones((4, 5), bool)
    pairs = PairBatch(*(tokens, mask) * 3, np.zeros(4, np.float32), np.ones(4, bool))
    assert target_share(pairs) == 2 / 3
    flops = count_flops(jax.make_jaxpr(reward.make_step(model, settings))(state, pairs, key))
    # Of both responses to themselves, of the prompt to itself, and of the responses to it.
    attention = 3 * 7 * 2 * 4 * (2 * 5 * 5 + 5 * 5 + 10 * 5) * 4 * 10
    # The head reads the ends of the eight responses alone.
    assert flops == 3 * (4 * 15 * 3 * DECODER_LAYER + 8 * 2 * 24) + attention


@pytest.mark.parametrize(
    "options", [{}, *newest({"num_layers_unfrozen": 1}, {"value_model": "policy"})]
)
def test_an_iteration_of_ppo_has_the_flops_that_utilization_counts(options):
    """But for attention, little beside this width, and the ends of responses, which predict none.

    Two fifths of the products of a token of a response are those with the unembedding.
    """
    sizes = {"vocab_size": 10_000, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    config = dataclasses.replace(UNTIED, max_position_embeddings=128, **sizes)
    model, key = Decoder(config, remat="none"), jax.random.key(0)
    settings = ppo.Settings(batch_size=4, num_mini_batches=2, response_length=64, **options)
    prompts = jnp.ones((4, 64), jnp.int32)

    def init(key):
        params = model.init(key)
        scorer = {"model": model.without_unembedding(params), "head": {"kernel": jnp.zeros(512)}}
        return ppo.init_state(model, params, settings, key, reward_params=scorer)

    state = jax.eval_shape(init, key)
    batch = PromptBatch(prompts, prompts > 0, jnp.arange(4))
    step = ppo.make_step(model, settings)
    counted = count_flops(jax.make_jaxpr(step)(state, batch, key))
    expected = online_flops(model, state, settings, prompt_length=64.0, reward_models=(model,))
    assert counted == pytest.approx(expected * 4 * 128, rel=0.05)
