"""FLOPs for each token against counts by hand: D = 32, 12 D^2 in a layer, V = 300 padded to 384."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.training import dpo, ppo, reward, sft
from rlhf_jax.training.flops import mixed_text_flops, offline_flops, online_flops

MODEL = GPT2(GPT2Config(vocab_size=300, n_positions=8, n_embd=32, n_layer=2, n_head=2))
LAYER, TABLE, HEAD = 2 * 12 * 32 * 32, 2 * 384 * 32, 2 * 32
LOGITS = TABLE * 6 / 8  # of responses of 6 tokens to prompts of 2


def shapes_of(trainer, settings, scorers=()):
    def init(key):
        params = MODEL.init(key)
        scorer = {"model": MODEL.init(key), "head": {"kernel": jnp.zeros(32)}}
        named = dict.fromkeys(scorers, scorer)
        return trainer.init_state(MODEL, params, settings, key, **named)

    return jax.eval_shape(init, jax.random.key(0))


def test_a_trained_parameter_counts_three_times_and_a_frozen_one_once():
    settings = sft.Settings()
    actual = offline_flops(MODEL, shapes_of(sft, settings), target_share=0.5)
    assert actual == 3 * (2 * LAYER + TABLE / 2)
    settings = reward.Settings(num_layers_unfrozen=1)
    actual = offline_flops(MODEL, shapes_of(reward, settings), target_share=0.0)
    assert actual == LAYER + 3 * (LAYER + HEAD)
    settings = dpo.Settings(num_layers_unfrozen=1)
    actual = offline_flops(MODEL, shapes_of(dpo, settings), target_share=0.5)
    assert actual == LAYER + 3 * LAYER + 2 * TABLE / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 3 * (2 * LAYER + LOGITS) + 2 * LAYER + HEAD + 4 * 3 * (2 * LAYER + LOGITS)),
        (
            {"num_ppo_epochs": 1, "surrogate": "kl_penalty"},
            4 * (2 * LAYER + LOGITS) + 2 * LAYER + HEAD + 3 * (2 * LAYER + LOGITS),
        ),
        # The frozen layer twice, its table three times; values of two layers of their own.
        (
            {"num_ppo_epochs": 2, "num_layers_unfrozen": 1, "value_model": "reward"},
            2 * LAYER
            + 3 * (LAYER + LOGITS)
            + 2 * (2 * LAYER + HEAD)
            + 2 * (3 * (3 * LAYER + HEAD) + 2 * LOGITS),
        ),
    ],
)
def test_an_iteration_of_ppo_samples_scores_and_updates(options, expected):
    settings = ppo.Settings(response_length=6, **options)
    state = shapes_of(ppo, settings, scorers=("reward_params", "value_params"))
    actual = online_flops(MODEL, state, settings, prompt_length=2.0, reward_models=(MODEL,))
    assert actual == expected


def test_texts_count_in_the_epochs_alone():
    settings = ppo.Settings(num_ppo_epochs=2, num_layers_unfrozen=1)
    state = shapes_of(ppo, settings)
    actual = mixed_text_flops(MODEL, state, settings, target_share=0.25)
    assert actual == 2 * (LAYER + 2 * TABLE / 4 + 3 * LAYER)
