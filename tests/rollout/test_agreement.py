"""The sampler and the training pass give a token the same log-probability."""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax.batches import Sequences
from rlhf_jax.functional import logprob_difference
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.rollout import generate, response_logprobs
from tests.versions import newest

TEMPERATURE = 0.7
DECODER = DecoderConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    initializer_range=0.3,
    tie_word_embeddings=True,
)
MODELS = (GPT2(GPT2Config(19, 32, 16, 2, 2, initializer_range=0.3)), Decoder(DECODER))


def widened(prompts, mask):
    """In a longer bucket, with other ids on the padding."""
    return np.pad(prompts, ((0, 0), (4, 0)), constant_values=3), np.pad(mask, ((0, 0), (4, 0)))


@pytest.mark.parametrize("model", [*newest(MODELS[0]), MODELS[1]], ids=("gpt2", "decoder"))
def test_sampled_and_scored_logprobs_agree(model, prompts):
    """Within 2e-5, for K responses to each prompt and for one, in two buckets and two orders."""
    params = model.init(jax.random.key(0))
    sample = jax.jit(
        functools.partial(
            generate, model, max_new_tokens=8, temperature=TEMPERATURE, stop_token_ids=(1, 2)
        ),
        static_argnames="num_responses",
    )
    score = jax.jit(lambda *args: response_logprobs(model, *args, temperature=TEMPERATURE)[0])
    several = sample(params, *prompts, jax.random.key(1), num_responses=3)
    alone = sample(params, *widened(*(x[1:3] for x in prompts)), jax.random.key(2))
    assert len({*np.asarray(several.mask).sum(axis=2).flat}) > 2
    order = np.array([2, 0, 3, 1])
    shared = Sequences(*(x[order] for x in (*prompts, several.tokens, several.mask)))
    copied = (np.repeat(x, 3, axis=0) for x in widened(*prompts))
    flat = Sequences(*copied, *(x.reshape(12, 8) for x in (several.tokens, several.mask)))
    # Sampled in the long bucket, scored in the short one.
    short = Sequences(*(x[1:3] for x in prompts), alone.tokens, alone.mask)
    for sampled, sequences in ((several, shared), (several, flat), (alone, short)):
        logprobs = sampled.logprobs[order] if sequences is shared else sampled.logprobs
        scored, mask = score(params, sequences), sequences.mask
        _, largest = logprob_difference(*(x.reshape(-1, 8) for x in (logprobs, scored, mask)))
        assert largest <= 2e-5
