"""Online DPO: a loop, ties, frozen layers, settings that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import Rollout
from rlhf_jax.errors import InputError
from rlhf_jax.training import online_dpo
from tests.training.ppo_by_loop import EOS, KEY, RATE, SGD, logprobs_by_loop

SETTINGS = online_dpo.Settings(
    batch_size=4, num_responses=3, response_length=5, temperature=0.7, beta=0.3
)
# The third prompt ties; the fourth prompt's best and worst response are of the same tokens.
SCORES = np.array([[0.5, -2.0, 3.0], [1.0, 4.0, -1.0], [2.0, 2.0, 2.0], [1.0, 0.0, 0.5]])
BEST, WORST, PAIRS = (2, 1, 0, 0), (1, 2, 0, 1), (0, 1)


@pytest.fixture(scope="module")
def responses():
    """Three to each prompt, which were not sampled: all but those of length 5 end with EOS."""
    rng = np.random.default_rng(5)
    lengths = np.array([[3, 1, 5], [5, 2, 4], [2, 5, 1], [4, 4, 2]])
    mask = np.arange(5) < lengths[..., None]
    tokens = np.where(mask, rng.integers(0, 10, mask.shape), 0)
    for (b, k), length in np.ndenumerate(lengths):
        if length < 5:
            tokens[b, k, length - 1] = EOS
    tokens[3, 1] = tokens[3, 0]
    return Rollout(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.zeros(mask.shape))


@pytest.fixture(scope="module")
def state(model, params, ref_params):
    return online_dpo.init_state(model, params, SETTINGS, KEY, optimizer=SGD, ref_params=ref_params)


@pytest.fixture(scope="module")
def update(model):
    return jax.jit(
        online_dpo.make_update_step(model, SETTINGS, optimizer=SGD, stop_token_ids=(EOS,))
    )


def texts_of(batch, rollout):
    """[(prompt, [response, ...])] without padding."""
    batch, rollout = jax.tree.map(np.asarray, (batch, rollout))
    return [
        (
            list(batch.prompts[b][batch.prompt_mask[b]]),
            [
                list(each[real])
                for each, real in zip(rollout.tokens[b], rollout.mask[b], strict=True)
            ],
        )
        for b in range(len(batch.prompts))
    ]


def sums_by_loop(model, params, texts):
    """float64[B, K]: log-probabilities of responses, each behind a prompt of its own."""
    return np.array(
        [
            [
                logprobs_by_loop(params, model.config, prompt, each, SETTINGS.temperature)[0].sum()
                for each in responses
            ]
            for prompt, responses in texts
        ]
    )


def loss_by_loop(model, params, ref_params, texts):
    """(loss, log-ratios, log-probabilities of the best and the worst response), of real pairs."""
    logps, refs = (sums_by_loop(model, each, texts) for each in (params, ref_params))
    ratios = [[(logps - refs)[b, k] for b, k in enumerate(chosen)] for chosen in (BEST, WORST)]
    chosen, rejected = (np.array(each)[list(PAIRS)] for each in ratios)
    loss = np.mean(np.log1p(np.exp(-SETTINGS.beta * (chosen - rejected))))
    return loss, (chosen, rejected), logps, refs


@pytest.mark.newest
def test_one_update_is_that_of_a_loop(model, params, ref_params, batch, responses, state, update):
    after, metrics, scored = update(state, batch, responses, jnp.asarray(SCORES), KEY)
    texts = texts_of(batch, responses)
    loss, (chosen, rejected), logps, refs = loss_by_loop(model, params, ref_params, texts)
    kl = (logps - refs).mean()
    lengths = np.asarray(responses.mask).sum(axis=-1)
    expected = {
        "train/loss": loss,
        "rewards/chosen": 0.3 * chosen.mean(),
        "rewards/rejected": 0.3 * rejected.mean(),
        "rewards/margins": 0.3 * (chosen - rejected).mean(),
        "rewards/accuracies": np.mean(chosen > rejected),
        "logps/chosen": np.mean([logps[b, BEST[b]] for b in PAIRS]),
        "logps/rejected": np.mean([logps[b, WORST[b]] for b in PAIRS]),
        "objective/scores": SCORES.mean(),
        "objective/scores_margin": (SCORES.max(axis=1) - SCORES.min(axis=1)).mean(),
        "objective/ties": 0.5,
        "objective/kl": kl,
        "objective/entropy": -logps.mean(),
        "objective/non_score_reward": -0.3 * kl,
        "objective/rlhf_reward": SCORES.mean() - 0.3 * kl,
        "objective/response_length": lengths.mean(),
        "val/contain_eos_token": np.mean(lengths < 5),
        "beta": 0.3,
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-3, abs=1e-4), name
    np.testing.assert_allclose(scored.logprobs.sum(axis=-1), logps, rtol=1e-4, atol=1e-4)

    # The step is the gradient: moving along it changes the loss of the loop by its square.
    gradient = jax.tree.map(
        lambda old, new: (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / RATE,
        params,
        after.params["model"],
    )
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))
    assert float(metrics["train/grad_norm"]) == pytest.approx(square**0.5, rel=1e-3)
    sides = [
        loss_by_loop(
            model,
            jax.tree.map(lambda p, g, e=e: np.asarray(p, np.float64) + e * g, params, gradient),
            ref_params,
            texts,
        )[0]
        for e in (1e-5, -1e-5)
    ]
    assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(square, rel=1e-2)


def test_without_a_pair_nothing_moves(batch, responses, state, update):
    after, metrics, _ = update(state, batch, responses, jnp.ones((4, 3)), KEY)
    assert float(metrics["objective/ties"]) == 1
    assert float(metrics["train/loss"]) == float(metrics["train/grad_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.newest
def test_frozen_layers_and_microbatches_take_the_same_step(
    model, params, batch, responses, state, update
):
    """Policy and reference share the frozen layers, whose states are those of the pairs."""
    settings = dataclasses.replace(
        SETTINGS, num_layers_unfrozen=1, gradient_accumulation_steps=2, score_batch_size=2
    )
    frozen = online_dpo.init_state(model, params, settings, KEY, optimizer=SGD)
    step = online_dpo.make_update_step(model, settings, optimizer=SGD, stop_token_ids=(EOS,))
    after, metrics, _ = jax.jit(step)(frozen, batch, responses, jnp.asarray(SCORES), KEY)
    same = {"ref": jax.tree.map(jnp.copy, params)}
    expected, expected_metrics, _ = update(
        state._replace(frozen=same), batch, responses, jnp.asarray(SCORES), KEY
    )
    assert float(metrics["train/loss"]) == pytest.approx(
        float(expected_metrics["train/loss"]), rel=1e-5
    )
    _, upper = model.split(expected.params["model"], 1)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6),
        after.params["model"],
        upper,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_responses": 1}, "online_dpo.num_responses must be at least 2, but is 1."),
        ({"beta": 0.0}, "online_dpo.beta must be above 0, but is 0.0."),
        ({"kind": "aot"}, "online_dpo.kind must be sigmoid, .* or apo_down, but is 'aot'."),
        ({"kind": "exo_pair"}, "online_dpo.label_smoothing is 0, and the loss exo_pair"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing is 0.1, but ipo has none"),
        ({"num_mini_batches": 3}, "batch_size = 128 is not divisible by online_dpo.num_mini"),
        ({"judge_fn": "a:b", "subtract_reference_score": True}, "needs scores, which online_dpo"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(options, message):
    with pytest.raises(InputError, match=message):
        online_dpo.Settings(**options)
