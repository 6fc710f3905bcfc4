"""Preference optimization on pairs: TRL's courses, a loop, references, accumulation."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.preference_kinds import DPO_KINDS
from rlhf_jax.training import dpo, online_dpo_settings
from tests.models.gpt2_by_loop import hidden_by_loop
from tests.models.test_parity import language_model  # noqa: F401  a fixture
from tests.training import judged
from tests.versions import newest

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
COURSES = {
    "sigmoid": dpo.Settings(kind="sigmoid", beta=0.1),
    "ipo": dpo.Settings(kind="ipo", beta=0.2),
    "apo_down": dpo.Settings(kind="apo_down", beta=0.3, precompute_ref=False),
    "simpo": dpo.Settings(kind="simpo", beta=2.0, gamma=1.0),
    "cpo": dpo.Settings(kind="cpo", beta=0.1),
    "orpo": dpo.Settings(kind="orpo", beta=0.1),
}
PROMPTS = [[1, 5], [4], [7, 3, 0], [2, 2, 2]]
CHOSEN = [[2, 9, 10], [10], [8, 1], [6, 10]]
REJECTED = [[3, 10], [7, 7, 2, 10], [8, 2], [5, 5, 10]]


@pytest.fixture(scope="module")
def batch():
    """Four pairs and two examples that are padding."""
    return judged.pairs(PROMPTS, CHOSEN, REJECTED, size=6, prompt_width=4, width=5)


@pytest.mark.parametrize(
    "name", ["sigmoid", *newest(*(name for name in COURSES if name != "sigmoid"))]
)
def test_six_steps_are_those_of_trl(language_model, name):  # noqa: F811
    columns = [judged.COURSES[column] for column in ("prompts", "chosen", "rejected")]
    lines = judged.course(dpo, *language_model, judged.pairs(*columns), COURSES[name])
    judged.assert_is_course_of_trl(lines, name)


def sums_by_loop(params, config, prompts, responses):
    """Log-probabilities of responses, one sequence at a time, in float64."""
    table = np.asarray(params["wte"]["embedding"], np.float64)[: config.vocab_size]
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = hidden_by_loop(params, config, prompt + response) @ table.T
        logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        sums.append(sum(logprobs[p, t] for p, t in zip(places, response, strict=True)))
    return np.array(sums)


def test_loss_and_metrics_are_those_of_a_loop(model, params, ref_params, batch):
    settings = dpo.Settings(beta=0.5)
    policy, reference = (
        [sums_by_loop(each, model.config, PROMPTS, texts) for texts in (CHOSEN, REJECTED)]
        for each in (params, ref_params)
    )
    rewards = [0.5 * (own - other) for own, other in zip(policy, reference, strict=True)]
    margins = rewards[0] - rewards[1]
    fields = jax.jit(dpo.make_reference_step(model, settings))(ref_params, batch)
    np.testing.assert_allclose(fields["ref_chosen"][:4], reference[0], rtol=1e-4)
    batch = batch._replace(**fields)
    state = dpo.init_state(model, params, settings, KEY, optimizer=SGD)
    _, metrics = jax.jit(dpo.make_step(model, settings, optimizer=SGD))(state, batch, KEY)
    expected = {
        "train/loss": np.mean(np.log1p(np.exp(-margins))),
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": np.mean(margins > 0),
        "logps/chosen": policy[0].mean(),
        "logps/rejected": policy[1].mean(),
        "train/implicit_kl": np.mean(rewards) / 0.5,
        "perf/tokens": sum(len(text) for texts in (PROMPTS, CHOSEN, REJECTED) for text in texts),
    }
    assert metrics.keys() == {*expected, "train/grad_norm"}
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-4), name
    evaluated = jax.jit(dpo.make_eval_step(model, settings))(params, batch)
    assert float(evaluated["count"]) == 4
    assert float(evaluated["loss"]) == pytest.approx(4 * expected["train/loss"], rel=1e-4)
    assert float(evaluated["accuracy"]) == 4 * expected["rewards/accuracies"]
    # The chosen response is longer in one pair, as long in another, shorter in two.
    assert float(evaluated["longer_wins"]) == 1.5


@pytest.mark.newest
@pytest.mark.parametrize("options", [{"kind": "orpo"}, {"kinds": ("sft",)}])
def test_the_evaluation_of_a_likelihood_is_the_loss_of_the_step(model, params, batch, options):
    settings = dpo.Settings(**options)
    batch = batch._replace(ref_chosen=jnp.full(6, -5.0), ref_rejected=jnp.full(6, -6.0))
    state = dpo.init_state(model, params, settings, KEY, optimizer=SGD)
    _, metrics = jax.jit(dpo.make_step(model, settings, optimizer=SGD))(state, batch, KEY)
    sums = jax.jit(dpo.make_eval_step(model, settings))(params, batch)
    expected = float(metrics["train/loss"])
    assert float(sums["loss"] / sums["count"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.newest
def test_accumulated_gradients_are_those_of_the_batch(model, params, batch):
    """Of a mean over pairs and one over tokens, above frozen layers."""
    options = {"kinds": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5), "num_layers_unfrozen": 1}
    settings = dpo.Settings(**options, beta=0.5, batch_size=6)
    batch = batch._replace(ref_chosen=jnp.full(6, -5.0), ref_rejected=jnp.full(6, -6.0))
    results = []
    for steps in (1, 3):
        settings = dataclasses.replace(settings, gradient_accumulation_steps=steps)
        state = dpo.init_state(model, params, settings, KEY, optimizer=SGD)
        results.append(jax.jit(dpo.make_step(model, settings, optimizer=SGD))(state, batch, KEY))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), *results)


@pytest.mark.newest
def test_a_live_reference_is_a_computed_one(model, params, batch):
    """And with frozen layers its frozen half is the policy's, which no step changes."""
    settings = dpo.Settings(beta=0.5, num_layers_unfrozen=1)
    live = dataclasses.replace(settings, precompute_ref=False)
    fields = jax.jit(dpo.make_reference_step(model, settings))(params, batch)
    lines = []
    for each, own in ((settings, batch._replace(**fields)), (live, batch)):
        state = dpo.init_state(model, params, each, KEY, optimizer=SGD)
        frozen = jax.tree.map(np.asarray, state.frozen)
        step = jax.jit(dpo.make_step(model, each, optimizer=SGD))
        for _ in range(2):
            state, metrics = step(state, own, KEY)
        lines.append({name: float(x) for name, x in metrics.items()})
        jax.tree.map(np.testing.assert_array_equal, frozen, state.frozen)
    assert lines[0] == pytest.approx(lines[1], rel=1e-4, abs=1e-5)
    assert lines[0]["rewards/margins"] > 0.01


@pytest.mark.newest
def test_the_reference_moves_to_the_policy_where_it_is_synchronised(model, params, batch):
    settings = dpo.Settings(
        precompute_ref=False,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.25,
    )
    state = dpo.init_state(model, params, settings, KEY, optimizer=SGD)
    step = jax.jit(dpo.make_step(model, settings, optimizer=SGD))
    state, _ = step(state, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, state.reference, params)
    state, _ = step(state, batch, KEY)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, params, state.params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
        state.reference,
        expected,
    )


@pytest.mark.newest
def test_excess_tokens_of_the_longer_response_weigh_less(model, params, batch):
    """With ld_alpha 0 responses are as if the longer one were cut off."""
    short = [
        [x[: min(len(x), len(y))] for x, y in zip(*texts, strict=True)]
        for texts in ((CHOSEN, REJECTED), (REJECTED, CHOSEN))
    ]
    cut = judged.pairs(PROMPTS, *short, size=6, prompt_width=4, width=5)
    desensitized = dpo.Settings(ld_alpha=0.0)
    fields = dpo.make_reference_step(model, desensitized)(params, batch)
    expected = dpo.make_reference_step(model, dpo.Settings())(params, cut)
    for name, x in expected.items():
        np.testing.assert_allclose(fields[name][:4], x[:4], rtol=1e-5)


@pytest.mark.newest
def test_weights_of_pairs_scale_their_losses_without_a_gradient(model, params, batch):
    """SGD's step with WPO is that of the loss whose pairs have these weights as constants."""
    fields = {"ref_chosen": jnp.full(6, -5.0), "ref_rejected": jnp.full(6, -6.0)}
    settings = dpo.Settings(beta=0.5, use_weighting=True)
    state = dpo.init_state(model, params, settings, KEY, optimizer=SGD)
    _, metrics = jax.jit(dpo.make_step(model, settings, optimizer=SGD))(
        state, batch._replace(**fields), KEY
    )
    margins, weights = [], []
    table = np.asarray(params["wte"]["embedding"], np.float64)[: model.config.vocab_size]
    for prompt, *texts in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        weight = 1.0
        for text in texts:
            logits = hidden_by_loop(params, model.config, prompt + text) @ table.T
            p = np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True)
            places = np.arange(len(prompt) - 1, len(prompt) + len(text) - 1)
            ratio = p[places, text] / np.sum(p[places] ** 2, axis=-1)
            weight *= np.exp(np.mean(np.log(ratio)))
        weights.append(weight)
        chosen, rejected = (
            sums_by_loop(params, model.config, [prompt], [text])[0] for text in texts
        )
        margins.append(0.5 * ((chosen + 5.0) - (rejected + 6.0)))
    expected = np.mean(np.array(weights) * np.log1p(np.exp(-np.array(margins))))
    assert float(metrics["train/loss"]) == pytest.approx(expected, rel=1e-4)


def test_a_step_without_reference_log_probabilities_is_refused(model, params, batch):
    settings = dpo.Settings()
    state = dpo.init_state(model, params, settings, KEY)
    with pytest.raises(InputError, match="give the batch ref_chosen and ref_rejected"):
        dpo.make_step(model, settings)(state, batch, KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpo"}, "dpo.kind must be sigmoid, robust, "),
        ({"beta": 0.0}, "dpo.beta must be above 0, but is 0.0."),
        ({"kind": "hinge", "label_smoothing": 0.1}, "dpo.label_smoothing is 0.1, but hinge has"),
        ({"kind": "exo_pair"}, "dpo.label_smoothing is 0.0, and the loss exo_pair is then inf"),
        ({"label_smoothing": 0.5}, "dpo.label_smoothing must be at least 0, below 0.5, but is"),
        (
            {"kind": "aot", "gradient_accumulation_steps": 2},
            "dpo.gradient_accumulation_steps is 2, but aot sorts the batch",
        ),
        (
            {"kind": "apo_zero", "f_divergence_type": "forward_kl"},
            "dpo.f_divergence_type is forward_kl, but apo_zero needs reverse_kl",
        ),
        ({"kind": "simpo", "ld_alpha": 0.5}, "dpo.ld_alpha is 0.5, but simpo has no reference"),
        ({"kind": "orpo", "use_weighting": True}, "dpo.use_weighting is True, but orpo has no"),
        ({"sync_ref_model": True}, "dpo.sync_ref_model is True, but a reference that moves"),
        (
            {"kinds": ("sigmoid", "sft"), "loss_weights": (1.0,)},
            r"dpo.loss_weights is \(1.0,\), but dpo.kinds names 2 losses; give one weight",
        ),
        ({"kinds": ("simpo",)}, r"dpo.kinds is \('simpo',\), but simpo is none of sigmoid, robust"),
        ({"kinds": ("sigmoid", "sft"), "kind": "ipo"}, "dpo.kind is ipo, but dpo.kinds is given"),
        (
            {"kinds": ("sigmoid",), "loss_weights": (float("nan"),)},
            r"dpo.loss_weights is \(nan,\), but weights are not negative",
        ),
        ({"gamma": 0.5}, "dpo.gamma is 0.5, but sigmoid does not read it; leave it out."),
        ({"ref_model_sync_steps": 2}, "dpo.ref_model_sync_steps is 2, but dpo.sync_ref_model is"),
        ({"kind": "cpo", "precompute_ref": False}, "dpo.precompute_ref is False, but cpo has no"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        dpo.Settings(**options)


def test_the_kinds_of_online_dpo_are_kinds_of_dpo():
    assert set(get_args(online_dpo_settings.OnlineKind)) < set(DPO_KINDS)
