"""GRPO and RLOO: TRL's numbers, a plain loss, equal scores, truncation, settings."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import Rollout, ScoredRollout
from rlhf_jax.errors import InputError
from rlhf_jax.training import grpo, rloo_settings
from rlhf_jax.training.grpo_loss import Targets, policy_loss, selected_tokens
from tests.training.ppo_by_loop import EOS, KEY, RATE, SGD

SCORES = np.array(
    [[0.5, -2.0, 3.0], [1.0, 4.0, -1.0], [2.0, 2.0, 2.0], [1.0, 0.0, 0.5]], np.float32
)
GRPO = grpo.Settings(
    batch_size=4,
    num_generations=3,
    response_length=5,
    temperature=0.7,
    loss_type="grpo",
    epsilon=0.01,
    epsilon_high=0.03,
    scale_rewards="batch",
    beta=0.3,
    kl_estimator="k2",
    entropy_coef=0.2,
    top_entropy_quantile=0.6,
    mask_truncated_completions=True,
    importance_sampling_mode="token_truncate",
    importance_sampling_cap=1.1,
)
RLOO = rloo_settings.Settings(
    batch_size=4,
    num_generations=3,
    response_length=5,
    temperature=0.7,
    num_iterations=2,
    epsilon=0.1,
    beta=0.3,
    mask_truncated_completions=True,
)
LENGTHS = np.array([[3, 1, 5], [5, 2, 4], [2, 5, 1], [4, 4, 2]])
REAL = np.arange(5) < LENGTHS[..., None]


@pytest.fixture(scope="module")
def responses(model, params, batch):
    """Three to each prompt: all but those of length 5 end with EOS.

    The sampler's log-probabilities are those of the policy but for some noise.
    """
    rng, mask = np.random.default_rng(5), REAL
    tokens = np.where(mask, rng.integers(0, 10, mask.shape), 0)
    for (b, k), length in np.ndenumerate(LENGTHS):
        if length < 5:
            tokens[b, k, length - 1] = EOS
    rollout = Rollout(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.zeros(mask.shape))
    logprobs, _ = logprobs_of(model, 0.7)(params, batch, rollout)
    noise = 0.2 * rng.normal(size=mask.shape)
    return rollout._replace(logprobs=jnp.where(mask, logprobs + noise, 0.0).astype(jnp.float32))


@functools.cache
def logprobs_of(model, temperature):
    """(params, batch, rollout) -> (logprobs, entropy) [B, K, T], each behind its own prompt."""

    def call(params, batch, rollout):
        count, length = rollout.tokens.shape[1:]
        tokens, mask = (
            jnp.concatenate([jnp.repeat(prompts, count, axis=0), each.reshape(-1, length)], axis=1)
            for prompts, each in (
                (batch.prompts, rollout.tokens),
                (batch.prompt_mask, rollout.mask),
            )
        )
        hidden = model.hidden(params, tokens, mask)[:, -length - 1 : -1]
        full = jax.nn.log_softmax(model.logits(params, hidden) / temperature)
        entropy = -jnp.sum(jnp.exp(full) * full, axis=-1)
        chosen = jnp.take_along_axis(full, tokens[:, -length:, None], axis=-1)[..., 0]
        return chosen.reshape(rollout.tokens.shape), entropy.reshape(rollout.tokens.shape)

    return jax.jit(call)


def plain_grpo(logprobs, entropy, old, old_entropy, ref, sampler, mask):
    """The loss of `GRPO`, written out for its settings; arrays [B, K, T]."""
    advantages = (SCORES - SCORES.mean(axis=1, keepdims=True)) / (SCORES.std(ddof=1) + 1e-4)
    threshold = jnp.quantile(old_entropy[mask], 1 - 0.6)
    factor = jnp.minimum(jnp.exp(old - sampler), 1.1) * (old_entropy >= threshold)
    ratio, advantage = jnp.exp(logprobs - old), advantages[..., None]
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.99, 1.03) * advantage)
    losses = -factor * surrogate + 0.3 * 0.5 * (logprobs - ref) ** 2 - 0.2 * entropy
    lengths = np.maximum(mask.sum(axis=-1, keepdims=True), 1)
    return (losses * mask / lengths / advantages.size).sum()


def plain_rloo(logprobs, entropy, old, old_entropy, ref, sampler, mask):
    """The loss of `RLOO`, whose KL to the reference is part of the scores."""
    scores = SCORES - 0.3 * ((old - ref) * REAL).sum(axis=-1)
    others = (scores.sum(axis=1, keepdims=True) - scores) / 2
    ratio, advantage = jnp.exp(((logprobs - old) * mask).sum(axis=-1)), scores - others
    losses = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.9, 1.1) * advantage)
    return (losses * mask.any(axis=-1)).sum() / losses.size


def plain_updates(model, settings, params, ref_params, batch, rollout, plain):
    """(parameters, losses) of the updates of an iteration by SGD, with a plain loss."""
    run, mask = logprobs_of(model, 0.7), np.array(rollout.mask)
    old, old_entropy = run(params, batch, rollout)
    ref, _ = run(ref_params, batch, rollout)
    mask[mask.all(axis=-1)] = False  # truncated

    def loss(params):
        logprobs, entropy = run(params, batch, rollout)
        return plain(logprobs, entropy, old, old_entropy, ref, rollout.logprobs, mask)

    gradient, losses = jax.value_and_grad(loss), []
    for _ in range(settings.num_iterations):
        value, grads = gradient(params)
        losses.append(float(value))
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    return params, losses


@functools.cache
def update_with(model, settings):
    return jax.jit(grpo.make_update_step(model, settings, optimizer=SGD, stop_token_ids=(EOS,)))


def new_state(model, params, settings, ref_params=None):
    return grpo.init_state(model, params, settings, KEY, optimizer=SGD, ref_params=ref_params)


def assert_close(actual, expected, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


@pytest.mark.parametrize(
    ("settings", "plain"), [(GRPO, plain_grpo), (RLOO, plain_rloo)], ids=["grpo", "rloo"]
)
def test_an_iteration_is_that_of_a_plain_loss(
    model, params, ref_params, batch, responses, settings, plain
):
    state = new_state(model, params, settings, ref_params)
    update = update_with(model, settings)
    after, metrics, scored = update(state, batch, responses, jnp.asarray(SCORES), KEY)
    expected, losses = plain_updates(model, settings, params, ref_params, batch, responses, plain)
    assert float(metrics["train/loss"]) == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-5)
    assert_close(after.params["model"], expected)
    assert (float(metrics["clip_ratio/region_mean"]) > 0) == (settings is RLOO)
    # Of two updates the first has the ratio 1.
    assert float(metrics["clip_ratio/low_min"]) == 0
    factor = settings.updates_per_iteration
    highest = factor * float(metrics["clip_ratio/high_mean"])
    assert float(metrics["clip_ratio/high_max"]) == pytest.approx(highest)
    old, _ = logprobs_of(model, 0.7)(params, batch, responses)
    np.testing.assert_allclose(scored.logprobs, np.where(responses.mask, old, 0), atol=1e-5)
    lengths, ended = np.asarray(responses.mask).sum(-1), ~np.asarray(responses.mask).all(-1)
    measured = {
        "reward": SCORES.mean(),
        "reward_std": SCORES.std(ddof=1),
        "frac_reward_zero_std": 0.25,
        "completions/mean_length": lengths.mean(),
        "completions/min_length": 1,
        "completions/max_length": 5,
        "completions/mean_terminated_length": lengths[ended].mean(),
        "completions/max_terminated_length": 4,
        "completions/clipped_ratio": 0.25,
        "perf/tokens": lengths.sum() + np.asarray(batch.prompt_mask).sum(),
    }
    for name, value in measured.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name


@pytest.mark.newest
def test_frozen_layers_and_microbatches_take_the_same_step(model, params, batch, responses):
    settings = dataclasses.replace(
        GRPO, num_layers_unfrozen=1, gradient_accumulation_steps=2, score_batch_size=2
    )
    arguments = (batch, responses, jnp.asarray(SCORES), KEY)
    state = new_state(model, params, settings)
    after, metrics, _ = update_with(model, settings)(state, *arguments)
    state = new_state(model, params, GRPO)
    expected, full, _ = update_with(model, GRPO)(state, *arguments)
    _, upper = model.split(expected.params["model"], 1)
    assert_close(after.params["model"], upper)
    for name in metrics.keys() - {"train/grad_norm"}:  # of other parameters
        assert float(metrics[name]) == pytest.approx(float(full[name]), rel=1e-4, abs=1e-5), name


def test_without_spread_or_an_end_nothing_moves(model, params, batch, responses):
    update, state = update_with(model, RLOO), new_state(model, params, RLOO)
    endless = jnp.where(responses.tokens == EOS, 1, responses.tokens)
    for rollout, scores, share in (
        (responses, jnp.full_like(SCORES, 0.1), 1.0),
        (responses._replace(tokens=endless), jnp.asarray(SCORES), 0.25),
    ):
        after, metrics, _ = update(state, batch, rollout, scores, KEY)
        assert float(metrics["frac_reward_zero_std"]) == share
        assert float(metrics["train/loss"]) == float(metrics["train/grad_norm"]) == 0
        jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@pytest.mark.newest
def test_one_token_and_one_response(model, params, batch, reward_model, reward_params):
    """REINFORCE++ has no group; the KL in its rewards is that of tokens."""
    settings = grpo.Settings(
        batch_size=4,
        num_generations=1,
        response_length=1,
        advantage_estimator="reinforce_pp",
        beta=0.1,
        kl_in="reward",
    )
    state = grpo.init_state(
        model, params, settings, KEY, optimizer=SGD, reward_params=reward_params
    )
    step = grpo.make_step(
        model, settings, reward_model=reward_model, optimizer=SGD, stop_token_ids=(EOS,)
    )
    after, metrics, rollout = jax.jit(step)(state, batch, KEY)
    scores = np.asarray(rollout.scores)[:, 0]
    expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(rollout.advantages[:, 0, 0], expected, rtol=1e-4, atol=1e-5)
    assert "frac_reward_zero_std" not in metrics
    assert all(np.isfinite(float(x)) for x in metrics.values())
    assert float(metrics["train/grad_norm"]) > 0


@pytest.mark.newest
def test_rewards_are_normalized_apart(model, params, batch, responses):
    """Scaling one of them leaves the advantages as they are, but for the epsilon."""
    settings = grpo.Settings(
        batch_size=4,
        num_generations=3,
        response_length=5,
        multi_objective_aggregation="normalize_then_sum",
    )
    weights = (1.0, 0.5)
    update = jax.jit(
        grpo.make_update_step(
            model, settings, optimizer=SGD, stop_token_ids=(EOS,), reward_weights=weights
        )
    )
    parts = np.stack([SCORES, np.roll(SCORES, 1, axis=1)], axis=-1)
    parts[3, 0, 1] = np.nan  # it does not apply
    state, results = new_state(model, params, settings), []
    for scale in (1.0, 1000.0):
        given = jnp.asarray(parts * np.array([1.0, scale], np.float32))
        _, metrics, scored = update(state, batch, responses, given, KEY)
        assert scored.ref_logprobs is None
        assert "ref" not in state.frozen
        known = np.nan_to_num(given)
        assert float(metrics["reward"]) == pytest.approx((known @ weights).mean(), rel=1e-5)
        results.append(np.asarray(scored.advantages)[..., 0])
    np.testing.assert_allclose(*results, atol=1e-3)
    assert np.ptp(results[0]) > 1


GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def golden(name, prefix):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {x.removeprefix(f"{prefix}/"): file[x] for x in file.files if f"{prefix}/" in x}


def assert_is_trls(case, index, settings):
    """The loss of GRPOTrainer of TRL 0.29.1 on its log-probabilities, a group of one each."""
    names = ("logprobs", "old_logprobs", "ref_logprobs", "mask")
    logprobs, old, ref, mask = (jnp.asarray(case[name][:, None]) for name in names)
    entropy = jnp.asarray(case.get("entropy", np.zeros_like(case["logprobs"]))[:, None])
    sampler = jnp.asarray(case.get("sampler_logprobs", case["old_logprobs"])[:, None])
    sampled = ScoredRollout(None, None, None, np.ones_like(mask), old, ref, None, None)
    selected = selected_tokens(settings, entropy, mask)
    advantages = jnp.asarray(case["advantages"][:, None])
    targets = Targets(sampled, advantages, mask, sampler, selected, None)
    loss = functools.partial(policy_loss, settings)
    (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs, entropy, targets)
    np.testing.assert_allclose(gradient[:, 0], case["out/grad"][index], rtol=2e-5, atol=1e-6)
    expected = {"train/loss": "loss", "kl": "kl", "entropy": "entropy"}
    if settings.importance_sampling_level == "token":  # TRL's are else means over responses
        expected |= {
            "clip_ratio/low_mean": "clip_low",
            "clip_ratio/high_mean": "clip_high",
            "cispo_clip_ratio": "cispo_clip",
        }
    for name in expected.keys() & metrics.keys():
        if (out := f"out/{expected[name]}") in case:
            value = case[out][index]
            assert float(metrics[name]) == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_the_losses_are_trls():
    """Of each loss type, with every setting that TRL's reads."""
    case = golden("trl_grpo", "loss")
    hyperparameters = {x.removeprefix("hp/"): y for x, y in case.items() if "hp/" in x}
    lengths = hyperparameters.pop("max_completion_length")
    modes = hyperparameters.pop("importance_mode")
    for index, length in enumerate(lengths):
        options = {name: values[index].item() for name, values in hyperparameters.items()}
        if np.isinf(options["delta"]):
            del options["delta"]
        for name in {"cispo": ["epsilon"], "sapo": ["epsilon", "epsilon_high"]}.get(
            options["loss_type"], []
        ):
            del options[name]
        mode = {}
        if modes[index]:
            mode = {
                "importance_sampling_mode": str(modes[index]),
                "importance_sampling_cap": 1.25,
            }
        settings = grpo.Settings(
            num_iterations=2,
            response_length=int(length),
            **options,
            **mode,
        )
        assert_is_trls(case, index, settings)


def test_the_losses_with_a_response_without_tokens_are_trls():
    case = golden("trl", "grpo_empty_row")
    for index, loss_type in enumerate(case["hp/loss_type"]):
        settings = grpo.Settings(
            num_iterations=2,
            response_length=7,
            loss_type=str(loss_type),
            beta=float(case["hp/kl_coef"][index]),
            epsilon=float(case["hp/clip_range"][index]),
            epsilon_high=float(case["hp/clip_range_high"][index]),
        )
        assert_is_trls(case, index, settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_generations": 1},
            "num_generations is 1, but grpo.advantage_estimator grpo compares",
        ),
        (
            {
                "num_generations": 1,
                "advantage_estimator": "reinforce_pp",
                "max_sampling_rounds": 2,
            },
            "max_sampling_rounds is 2, but a single response to a prompt has no spread",
        ),
        ({"num_mini_batches": 3}, "batch_size = 32 is not divisible by grpo.num_mini_batches = 3"),
        ({"delta": 1.1}, r"grpo.delta must be above 1 \+ grpo.epsilon = 1.2, but is 1.1."),
        ({"loss_type": "sapo", "delta": 2.0}, "but grpo.loss_type sapo does not read it"),
        ({"loss_type": "cispo"}, "epsilon_high is None, but it is the largest ratio"),
        ({"loss_type": "luspo"}, "luspo needs grpo.importance_sampling_level sequence."),
        ({"loss_type": "rloo", "beta": 0.1}, "loss_type rloo has one ratio for a response"),
        ({"top_p": 0.9}, "top_p 0.9 sample from another distribution than the one that is"),
        ({"overlong_buffer": 32}, "must be below grpo.response_length = 32, but is 32."),
        ({"exact_kl": True}, "exact_kl needs a reference, which grpo.beta 0 does not hold."),
        (
            {"kl_in": "reward"},
            "grpo.kl_in is reward, but has an effect with grpo.beta above 0 only",
        ),
        ({"kl_estimator": "k1"}, "grpo.kl_estimator is k1, but has an effect with grpo.beta"),
        (
            {"use_bias_correction_kl": True},
            "but has an effect with grpo.beta above 0 and grpo.kl_i",
        ),
        (
            {"scale_rewards": "none", "advantage_estimator": "rloo"},
            "grpo.scale_rewards is none, but has an effect with grpo.advantage_estimator grpo",
        ),
        ({"overlong_penalty": 0.5}, "overlong_penalty is 0.5, but has an effect with grpo.over"),
        ({"loss_type": "sapo", "epsilon": 0.1}, "epsilon is 0.1, but has an effect with other los"),
        ({"sapo_temperature_pos": 2.0}, "but has an effect with grpo.loss_type sapo only; leave"),
        ({"importance_sampling_cap": 2.0}, "effect with grpo.importance_sampling_mode only"),
        ({"loss_type": "best"}, "grpo.loss_type must be grpo, .* or rloo, but is 'best'."),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "cliprange_reward": 1.0},
            "normalize_then_sum needs grpo.advantage_estimator grpo",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(options, message):
    with pytest.raises(InputError, match=message):
        grpo.Settings(**options)
