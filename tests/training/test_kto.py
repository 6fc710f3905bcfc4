"""Optimization on unpaired responses: TRL's courses, a loop, references, accumulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.training import kto
from tests.models.test_parity import language_model  # noqa: F401  a fixture
from tests.training import judged
from tests.training.test_dpo import CHOSEN, PROMPTS, REJECTED, sums_by_loop
from tests.versions import newest

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
COURSES = {
    "kto": kto.Settings(kind="kto", beta=0.1),
    "kto_weighted": kto.Settings(
        kind="kto",
        beta=0.2,
        desirable_weight=0.5,
        undesirable_weight=1.5,
        precompute_ref=False,
    ),
    "apo_zero_unpaired": kto.Settings(kind="apo_zero_unpaired", beta=0.1),
}
LABELS = [True, False, True, True]
RESPONSES = [CHOSEN[0], REJECTED[1], CHOSEN[2], CHOSEN[3]]
OTHER = [RESPONSES[-1], *RESPONSES[:-1]]


@pytest.fixture(scope="module")
def batch():
    return judged.unpaired(PROMPTS, RESPONSES, LABELS, OTHER, prompt_width=4, width=5)


@pytest.mark.parametrize("name", ["kto", *newest(*(name for name in COURSES if name != "kto"))])
def test_six_steps_are_those_of_trl(language_model, name):  # noqa: F811
    golden = judged.COURSES
    responses = [
        golden["chosen" if label else "rejected"][n] for n, label in enumerate(golden["labels"])
    ]
    other = [responses[-1], *responses[:-1]]
    batch = judged.unpaired(golden["prompts"], responses, golden["labels"], other)
    lines = judged.course(kto, *language_model, batch, COURSES[name])
    judged.assert_is_course_of_trl(lines, name)


def test_loss_and_metrics_are_those_of_a_loop(model, params, ref_params, batch):
    settings = kto.Settings(beta=0.5, desirable_weight=0.7)
    ratios, kls = (
        sums_by_loop(params, model.config, PROMPTS, texts)
        - sums_by_loop(ref_params, model.config, PROMPTS, texts)
        for texts in (RESPONSES, OTHER)
    )
    kl, labels = max(kls.mean(), 0.0), np.array(LABELS)
    losses = np.where(
        labels,
        0.7 * (1 - 1 / (1 + np.exp(-0.5 * (ratios - kl)))),
        1 - 1 / (1 + np.exp(-0.5 * (kl - ratios))),
    )
    fields = jax.jit(kto.make_reference_step(model, settings))(ref_params, batch)
    batch = batch._replace(**fields)
    state = kto.init_state(model, params, settings, KEY, optimizer=SGD)
    _, metrics = jax.jit(kto.make_step(model, settings, optimizer=SGD))(state, batch, KEY)
    expected = {
        "train/loss": losses.mean(),
        "train/kl": kl,
        "rewards/chosen": 0.5 * ratios[labels].mean(),
        "rewards/rejected": 0.5 * ratios[~labels].mean(),
        "rewards/margins": 0.5 * (ratios[labels].mean() - ratios[~labels].mean()),
        "rewards/accuracies": np.mean(np.where(labels, ratios > kl, ratios < kl)),
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-4), name
    evaluated = jax.jit(kto.make_eval_step(model, settings))(params, batch)
    assert float(evaluated["count"]) == 4
    assert float(evaluated["loss"]) == pytest.approx(4 * losses.mean(), rel=1e-4)


@pytest.mark.newest
def test_the_kl_estimate_has_no_gradient(model, params, batch):
    """Without it the gradient is that of the loss with its value as a constant."""
    settings = kto.Settings(beta=0.5)
    batch = batch._replace(ref_response=jnp.full(4, -6.0), ref_other=jnp.full(4, -20.0))

    def loss(params, settings):
        return kto._loss(model, settings, None, None, params, batch, None, None)

    gradients, metrics = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, settings)
    assert float(metrics["kl"]) > 0
    shifted = dataclasses.replace(settings, kind="apo_zero_unpaired")
    batch = batch._replace(ref_response=batch.ref_response + metrics["kl"])
    expected, _ = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, shifted)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradients, expected
    )


@pytest.mark.newest
def test_accumulated_gradients_are_those_of_the_batch(model, params, batch):
    batch = batch._replace(ref_response=jnp.full(4, -6.0), ref_other=jnp.zeros(4))
    results = []
    for steps in (1, 2):
        settings = kto.Settings(
            kind="apo_zero_unpaired", batch_size=4, gradient_accumulation_steps=steps
        )
        state = kto.init_state(model, params, settings, KEY, optimizer=SGD)
        results.append(jax.jit(kto.make_step(model, settings, optimizer=SGD))(state, batch, KEY))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), *results)


def test_input_that_does_not_fit_is_one_sentence(model, params, batch):
    with pytest.raises(InputError, match="^kto.gradient_accumulation_steps is 2, but the loss kto"):
        kto.Settings(gradient_accumulation_steps=2)
    settings = kto.Settings()
    state = kto.init_state(model, params, settings, KEY)
    with pytest.raises(InputError, match="give the batch ref_response and ref_other"):
        kto.make_step(model, settings)(state, batch, KEY)
