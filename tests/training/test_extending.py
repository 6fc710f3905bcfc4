"""A further online trainer is one file: docs/examples/reinforce.py, trained and checked here."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import training
from rlhf_jax.batches import PromptBatch
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.training import online
from tests.training.ppo_by_loop import KEY, RATE, SCORES, SGD, logprobs_by_loop, texts_of

FILE = Path(__file__).parents[2] / "docs" / "examples" / "reinforce.py"


@pytest.fixture(scope="module")
def reinforce():
    spec = importlib.util.spec_from_file_location("reinforce", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reinforce"] = module  # where the record and dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reinforce"]


def test_the_record_is_all_that_the_library_needs(reinforce, monkeypatch):
    monkeypatch.setattr(training, "TRAINERS", (*training.TRAINERS, reinforce.TRAINER))
    record = training.TRAINERS[-1]
    assert record.steps is reinforce
    assert record.settings().num_updates == record.settings().total_iterations == 64
    with pytest.raises(InputError, match="reinforce.baseline_decay must be at least 0 and below 1"):
        record.settings(baseline_decay=1.0)
    with pytest.raises(InputError, match="reinforce.response_length must be above 0, but is 0"):
        record.settings(response_length=0)


def test_the_update_is_that_of_a_loop(reinforce, model, params, ref_params, batch, rollout):
    """Loss, baseline, and the slope of the loss along the update, all by loops in float64."""
    settings = reinforce.Settings(
        batch_size=4, response_length=5, temperature=0.7, kl_coef=0.3, baseline_decay=0.75
    )
    start = reinforce.init_state(model, params, settings, KEY, optimizer=SGD, ref_params=ref_params)
    start = start._replace(baseline=jnp.float32(0.4))
    step = jax.jit(reinforce.make_update_step(model, settings, optimizer=SGD))
    after, metrics, scored = step(start, batch, rollout, SCORES, KEY)

    def logprobs_of(policy, text):
        return logprobs_by_loop(policy, model.config, *text, settings.temperature)[0]

    advantages, first_returns = [], []
    for text, score in zip(texts_of(scored), SCORES, strict=True):
        rewards = -0.3 * (logprobs_of(params, text) - logprobs_of(ref_params, text))
        rewards[-1] += score
        returns = [sum(rewards[t:]) for t in range(len(rewards))]
        advantages.append(np.array(returns) - 0.4)
        first_returns.append(returns[0])

    def loss_by_loop(policy):
        losses = [
            -a * logprobs_of(policy, text)
            for a, text in zip(advantages, texts_of(scored), strict=True)
        ]
        return np.concatenate(losses).mean()

    assert float(metrics["loss/policy_avg"]) == pytest.approx(loss_by_loop(params), rel=1e-3)
    baseline = 0.75 * 0.4 + 0.25 * np.mean(first_returns)
    assert float(after.baseline) == pytest.approx(baseline, rel=1e-3)
    gradient = jax.tree.map(
        lambda old, new: (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / RATE,
        params,
        after.params["model"],
    )
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))
    assert float(metrics["train/grad_norm"]) == pytest.approx(square**0.5, rel=1e-3)
    sides = [
        loss_by_loop(
            jax.tree.map(lambda p, g, e=e: np.asarray(p, np.float64) + e * g, params, gradient)
        )
        for e in (1e-5, -1e-5)
    ]
    assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(square, rel=1e-2)


def test_full_steps_raise_the_score_of_a_reward_model(reinforce):
    """By one program, above frozen layers, in microbatches, with scaled scores."""
    model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    scorer = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    settings = reinforce.Settings(
        batch_size=32,
        response_length=2,
        stop_at_eos=False,
        kl_coef=0.01,
        num_layers_unfrozen=1,
        gradient_accumulation_steps=2,
        score_batch_size=16,
        scale_reward="running",
    )
    # The score is that of the last token: layers and positions add nothing to its embedding.
    scorer_params = scorer.init(jax.random.key(1))
    for name in ("layers", "wpe"):
        scorer_params[name] = jax.tree.map(jnp.zeros_like, scorer_params[name])
    embedding = scorer_params["wte"]["embedding"]
    kernel = embedding[3] / jnp.linalg.norm(embedding[3])
    reward_params = {"model": scorer_params, "head": {"kernel": kernel}}
    optimizer, params = optax.adam(0.02), model.init(KEY)
    params["wte"]["embedding"] *= 20.0  # frozen: fresh ones are too small for a sharp policy
    state = reinforce.init_state(
        model, params, settings, KEY, optimizer=optimizer, reward_params=reward_params
    )
    update_step = reinforce.make_update_step(model, settings, optimizer=optimizer)
    full_step = online.make_step(model, settings, update_step, reward_model=scorer)
    step = jax.jit(full_step, donate_argnums=0)
    batch = PromptBatch(jnp.ones((32, 1), jnp.int32), jnp.ones((32, 1), bool), jnp.arange(32))
    reference = jax.tree.map(np.asarray, online.reference_params(model, state))
    scores = []
    for number in range(12):
        state, metrics, _ = step(state, batch, jax.random.fold_in(KEY, number))
        scores.append(float(metrics["objective/unscaled_scores"]))
    assert np.mean(scores[-3:]) > scores[0] + 1.0
    assert step._cache_size() == 1
    assert int(state.step) == 12
    jax.tree.map(np.testing.assert_array_equal, online.reference_params(model, state), reference)
