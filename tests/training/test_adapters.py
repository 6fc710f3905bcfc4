"""Adapters in the steps of trainers: their gradients, the reference, what is frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.batches import PairBatch
from rlhf_jax.errors import InputError
from rlhf_jax.models.adapter_folders import with_settings
from rlhf_jax.models.adapter_settings import LoraSettings
from rlhf_jax.models.adapters import plain_params, with_adapters, without_adapters
from rlhf_jax.training import dpo, grpo, kto, online, ppo, reward, sft, trainable
from tests.training import judged
from tests.training.ppo_by_loop import EOS, KEY, SETTINGS, SGD
from tests.training.test_dpo import CHOSEN, PROMPTS
from tests.training.test_grpo import GRPO, SCORES, responses  # noqa: F401  a fixture
from tests.training.test_sft import TEXTS, batch_of

LORA = LoraSettings(r=3, alpha=6.0, target_modules=("c_attn", "mlp.c_proj"))
ROUNDED = dataclasses.replace(LORA, base="bfloat16")
DORA = dataclasses.replace(ROUNDED, use_dora=True)
UNPAIRED = judged.unpaired(PROMPTS, CHOSEN, [True, False, True, True], CHOSEN[::-1])
ADAM = optax.adam(0.01)


def adapted(model, params, settings=LORA):
    model = with_settings(model, settings)
    return model, jax.jit(functools.partial(with_adapters, model))(params, KEY)


def changed(old, new):
    return {
        jax.tree_util.keystr(path): bool((x != y).any())
        for (path, x), y in zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True)
    }


@pytest.mark.newest
def test_a_step_is_that_of_a_network_with_summed_kernels(model, params):
    """With A and B in layer 1 alone: layer 0 is below all adapters."""
    tuned, both = adapted(model, params, dataclasses.replace(LORA, layers_to_transform=(1,)))
    module = both["layers"]["attn"]["c_attn"]
    b = module["lora_b"].at[1].set(jax.random.normal(KEY, module["lora_b"].shape[1:]))
    both["layers"]["attn"]["c_attn"]["lora_b"] = b
    batch = batch_of([[TEXTS[0], TEXTS[1]], [TEXTS[2]], [TEXTS[3]]], 8)
    settings = sft.Settings(batch_size=3, dropout=False)
    state = sft.init_state(tuned, both, settings, KEY, optimizer=SGD)
    assert state.frozen.lower["layers"]["ln_1"]["scale"].shape == (1, 16)
    trained = state.params["layers"]
    after, metrics = jax.jit(sft.make_step(tuned, settings, optimizer=SGD))(state, batch, KEY)

    def loss(trained):
        summed = jax.tree.map(lambda x: x, params)
        for outer, name in (("attn", "c_attn"), ("mlp", "c_proj")):
            own, kernel = trained[outer][name], params["layers"][outer][name]["kernel"]
            product = jnp.tensordot(own["lora_a"][0], own["lora_b"][0], 1)
            kernel = kernel.at[1].add(2.0 * product)  # alpha / r
            summed["layers"][outer][name] = {**summed["layers"][outer][name], "kernel": kernel}
        return sft.text_loss(model, trainable.Trainable(summed), batch)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(trained)
    expected = jax.tree.map(lambda x, grad: x - 0.05 * grad, trained, grads)
    assert float(metrics["train/loss"]) == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        after.params["layers"],
        expected,
    )
    assert sum(changed(trained, after.params["layers"]).values()) == 3  # A has no gradient at B = 0


@pytest.fixture(scope="module")
def iterations(model, params, reward_model, reward_params, batch):
    """Two iterations of PPO in one program: [state, metrics, state, metrics, state]."""
    tuned, both = adapted(model, params)
    settings = dataclasses.replace(SETTINGS, value_model="policy", num_mini_batches=2)
    options = {"optimizer": ADAM, "reward_params": reward_params}
    state = ppo.init_state(tuned, both, settings, KEY, **options)
    full = ppo.make_step(
        tuned, settings, reward_model=reward_model, optimizer=ADAM, stop_token_ids=(EOS,)
    )
    step = jax.jit(full)
    results = [state]
    for _ in range(2):
        state, metrics, _ = step(state, batch, KEY)
        results += [metrics, state]
    assert step._cache_size() == 1
    return tuned, results


@pytest.mark.newest
def test_ppo_trains_adapters_alone_beside_their_base(iterations, params):
    tuned, (before, first, _, second, after) = iterations
    assert float(first["objective/kl"]) == pytest.approx(0.0, abs=1e-5)
    assert float(second["objective/kl"]) > 1e-3
    assert all(changed(before.params, after.params).values())
    names = {path.split("'")[-2] for path in changed(before.params, after.params)}
    assert names == {"lora_a", "lora_b", "kernel", "bias"}  # the last two of the value head
    assert not any(changed(before.frozen, after.frozen).values())
    assert jax.tree.leaves(after.frozen["ref"]) == []
    reference = online.reference_params(tuned, after)
    jax.tree.map(np.testing.assert_array_equal, without_adapters(reference), params)
    policy = without_adapters(online.policy_params(tuned, after))
    jax.tree.map(np.testing.assert_array_equal, policy, params)


@pytest.mark.newest
def test_fresh_adapters_change_no_loss(model, params):
    """DPO begins at log 2, with PiSSA too, and a reward model scores as its base does."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.integers(0, 10, (4, 3)), jnp.int32) for _ in range(3)]
    real = jnp.ones((4, 3), bool)
    pairs = PairBatch(*(x for each in arrays for x in (each, real)), jnp.zeros(4), real[:, 0])
    settings = dpo.Settings(precompute_ref=False, batch_size=4)
    pissa = dataclasses.replace(LORA, init="pissa", target_modules=("all-linear",))
    tuned, both = adapted(model, params, pissa)
    state = dpo.init_state(tuned, both, settings, KEY, optimizer=SGD)
    after, metrics = jax.jit(dpo.make_step(tuned, settings, optimizer=SGD))(state, pairs, KEY)
    assert float(metrics["train/loss"]) == pytest.approx(np.log(2), abs=1e-5)
    assert jax.tree.leaves(after.reference) == []
    assert all(changed(state.params, after.params).values())

    tuned, both = adapted(model, params)
    scored = {"model": both, "head": {"kernel": jnp.arange(16.0)}}
    state = reward.init_state(tuned, scored, reward.Settings(), KEY, optimizer=SGD)
    score = jax.jit(reward.make_score_step(tuned))
    actual = score(reward.full_params(tuned, state), pairs)
    expected = jax.jit(reward.make_score_step(model))({**scored, "model": params}, pairs)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "lora"), [("kto", ROUNDED), ("grpo", DORA)], ids=["kto", "grpo with DoRA"]
)
def test_metrics_of_fresh_adapters_are_those_of_their_base(
    model,
    params,
    batch,
    responses,  # noqa: F811
    name,
    lora,
):
    """Loss and KL to the reference, which is the base alone; exactly but for the norms of DoRA."""
    tuned, both = adapted(model, params, lora)
    own = jax.tree.map(lambda x: x.astype("float32"), plain_params(both))
    results = []
    for each, full in ((model, own), (tuned, both)):
        if name == "kto":
            settings = kto.Settings(precompute_ref=False, batch_size=4)
            state = kto.init_state(each, full, settings, KEY, optimizer=SGD)
            step, inputs = kto.make_step(each, settings, optimizer=SGD), (UNPAIRED,)
        else:
            state = grpo.init_state(each, full, GRPO, KEY, optimizer=SGD)
            step = grpo.make_update_step(each, GRPO, optimizer=SGD, stop_token_ids=(EOS,))
            inputs = (batch, responses, SCORES)
        after, metrics, *_ = jax.jit(step)(state, *inputs, KEY)
        results.append(metrics)
        reference = after.reference if name == "kto" else after.frozen["ref"]
    assert jax.tree.leaves(reference) == []
    base, fresh = ({k: float(x) for k, x in each.items()} for each in results)
    assert base.pop("train/grad_norm") != fresh.pop("train/grad_norm")
    assert fresh == (pytest.approx(base, rel=1e-5, abs=1e-5) if lora.use_dora else base)


def test_settings_that_exclude_adapters_are_one_sentence(model, params):
    tuned, both = adapted(model, params)
    frozen = dataclasses.replace(SETTINGS, num_layers_unfrozen=1)
    with pytest.raises(InputError, match=r"ppo.num_layers_unfrozen is 1, but only adapters"):
        ppo.init_state(tuned, both, frozen, KEY)
    settings = dpo.Settings(precompute_ref=False, sync_ref_model=True)
    with pytest.raises(InputError, match=r"dpo.sync_ref_model mixes"):
        dpo.init_state(tuned, both, settings, KEY)
    with pytest.raises(
        InputError, match=r"lora: target_modules names 'q_proj', which is no linear"
    ):
        adapted(model, params, LoraSettings(r=2, target_modules=("q_proj",)))
