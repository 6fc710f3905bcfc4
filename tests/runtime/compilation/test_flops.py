"""FLOPs against counts by hand."""

import jax
import jax.numpy as jnp

from rlhf_jax.batches import TextBatch
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.rollout.generation import generate
from rlhf_jax.runtime.compilation.flops import count_flops
from rlhf_jax.training import sft

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
