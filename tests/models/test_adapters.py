"""Adapters: PEFT's numbers (tests/golden/make_adapters.py) and files, merging, bases, refusals."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.errors import InputError
from rlhf_jax.models import (
    LoraSettings,
    load_pretrained,
    load_reward_model,
    save_adapter,
    save_pretrained,
)
from rlhf_jax.models.adapter_folders import adapters_in, with_settings
from rlhf_jax.models.adapters import (
    merge_adapter,
    plain_params,
    unmerge_adapter,
    with_adapters,
)
from rlhf_jax.models.huggingface import check_pretrained
from rlhf_jax.training import trainable
from rlhf_jax.training.trainable import Trainable
from tests.golden.decoder_weights import weights
from tests.models.test_decoder_parity import write_folder

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "adapters.npz")
TOKENS, MASK = GOLDEN["tokens"], GOLDEN["mask"]


def write_case(folder, case, **changes):
    """The folders of a base and of an adapter on it, as transformers and PEFT write them."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    write_folder(base, json.loads(str(GOLDEN[f"{case}/config"])))
    config = {**json.loads(str(GOLDEN[f"{case}/adapter"])), **changes}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shapes = json.loads(str(GOLDEN[f"{case}/shapes"]))
    tensors = {n: weights(n, tuple(s)) + np.float32("magnitude" in n) for n, s in shapes.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    return base, adapter


@jax.jit(static_argnums=0)
def logits_of(model, params):
    return model.logits(params, model.hidden(params, TOKENS, MASK))


def error(logits, case):
    return np.abs(np.asarray(logits) - GOLDEN[f"{case}/logits"])[MASK].max()


@pytest.mark.parametrize("case", ["llama", "dora", "gpt2", "phi3"])
def test_adapters_equal_those_of_peft(case, tmp_path):
    base, adapter = write_case(tmp_path, case)
    model, params = load_pretrained(base, adapter_path=adapter)
    assert error(logits_of(model, params), case) < 2e-5

    save_adapter(tmp_path / "saved", model, params, base_path="somewhere")
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "saved", adapter)
    )
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    same_model, same = load_pretrained(base, adapter_path=tmp_path / "saved")
    assert same_model == model
    jax.tree.map(np.testing.assert_array_equal, same, params)

    save_pretrained(tmp_path / "merged", model, params)
    plain, merged = load_pretrained(tmp_path / "merged")
    assert error(logits_of(plain, merged), case) < 2e-5
    own_model, own = merge_adapter(model, params)
    assert own_model == plain
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), own, merged)
    if case != "dora":
        actual, expected = unmerge_adapter(params, merged), plain_params(params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-7), actual, expected)


@pytest.mark.parametrize("case", ["llama", "dora"])
def test_adapters_train_as_those_of_peft(case, tmp_path):
    base, adapter = write_case(tmp_path, case)
    model, params = load_pretrained(base, adapter_path=adapter)
    trained, frozen = trainable.split(model, params, None, "sft")
    optimizer = optax.adamw(1e-2, weight_decay=0.0)
    state = optimizer.init(trained)

    @jax.jit
    @jax.value_and_grad
    def loss(trained):
        full = trainable.full_params(model, Trainable(trained, frozen))
        logprobs = jax.nn.log_softmax(logits_of(model, full)[:, :-1])
        picked = jnp.take_along_axis(logprobs, TOKENS[:, 1:, None], -1)[..., 0]
        return -jnp.mean(picked, where=MASK[:, 1:])

    losses = []
    for _ in range(5):
        value, grads = loss(trained)
        updates, state = optimizer.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
        losses.append(float(value))
    np.testing.assert_allclose(losses, GOLDEN[f"{case}/losses"], atol=1e-4)


@pytest.mark.parametrize("lora", [{"base": "int8"}, {"init": "pissa", "use_rslora": True}], ids=str)
def test_trained_adapters_are_written_for_the_base_in_its_folder(lora, tmp_path):
    """PiSSA's are then plain ones of twice the rank, and those of int8 are beside float32."""
    base, _ = write_case(tmp_path, "gpt2")
    model, params = load_pretrained(base)
    before = logits_of(model, params)
    tuned = with_settings(model, LoraSettings(r=3, target_modules=("c_attn", "c_proj"), **lora))
    params = jax.jit(with_adapters, static_argnums=0)(tuned, params, jax.random.key(0))
    tolerance = 0.05 if "base" in lora else 1e-5
    np.testing.assert_allclose(logits_of(tuned, params), before, atol=tolerance)
    trained, frozen = trainable.split(tuned, params, None, "sft")
    trained = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), trained
    )
    params = trainable.full_params(tuned, Trainable(trained, frozen))
    after = logits_of(tuned, params)
    assert np.abs(after - before).max() > 0.1
    save_adapter(tmp_path / "saved", tuned, params, base_path=str(base))
    read = load_pretrained(base, adapter_path=tmp_path / "saved")
    np.testing.assert_allclose(logits_of(*read), after, atol=tolerance)
    save_pretrained(tmp_path / "merged", tuned, params)
    np.testing.assert_allclose(logits_of(*load_pretrained(tmp_path / "merged")), after, atol=1e-5)


def test_a_reward_adapter_is_read_with_its_head(tmp_path, caplog):
    """PEFT adds both names of heads to modules_to_save."""
    base, adapter = write_case(
        tmp_path,
        "gpt2",
        task_type="SEQ_CLS",
        modules_to_save=["classifier", "score"],
        use_dora=None,
    )
    file = adapter / "adapter_model.safetensors"
    head = np.arange(32, dtype=np.float32)
    save_file({**load_file(file), "base_model.model.score.weight": head[None]}, file)
    model, params = load_reward_model(base, adapter_path=adapter)
    np.testing.assert_array_equal(params["head"]["kernel"], head)
    assert error(logits_of(model, params["model"]), "gpt2") < 2e-5
    with pytest.raises(InputError, match="is an adapter of a reward model; give it to load_reward"):
        load_pretrained(base, adapter_path=adapter)
    assert not caplog.text
    biased = {**params, "head": {"kernel": params["head"]["kernel"], "bias": jnp.float32(2.5)}}
    save_adapter(tmp_path / "saved", model, biased, base_path="elsewhere")
    assert "are less by 2.5, the bias of the head" in caplog.text
    same_model, same = load_reward_model(base, adapter_path=tmp_path / "saved")
    assert same_model == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert "of the base elsewhere and now beside" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias is 'all', but only 'none' is supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base"),
        ({"target_parameters": ["x"]}, r"target_parameters is \['x'\], but is not supported"),
        ({"target_modules": ["gate"]}, "target_modules names 'gate', which is no linear module"),
        ({"r": 5}, r"has shape \[4, 32\], but this base asks for \[5, 32\]; give the base"),
        ({"target_modules": ["c_attn"]}, "is of no module that the adapter's configuration names"),
        ({"modules_to_save": ["norm"]}, "modules_to_save names 'norm', which the model does not"),
    ],
)
def test_adapters_that_cannot_be_read_are_one_sentence(changes, message, tmp_path):
    base, adapter = write_case(tmp_path, "gpt2", **changes)
    with pytest.raises(InputError, match=message):
        load_pretrained(base, adapter_path=adapter)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"layers_to_transform": (1, 4)}, "lora.layers_to_transform names 4, but the model has"),
        ({"r": 33, "init": "pissa"}, "lora: r is 33, but init pissa starts from the singular"),
    ],
)
def test_settings_beyond_the_model_are_one_sentence(lora, message, tmp_path):
    base, _ = write_case(tmp_path, "gpt2")
    with pytest.raises(InputError, match=message):
        with_settings(check_pretrained(base), LoraSettings(**{"r": 2, **lora}))


def test_dora_that_was_read_has_no_base_in_int8(tmp_path):
    base, adapter = write_case(tmp_path, "dora")
    model = check_pretrained(base)
    model = dataclasses.replace(model, adapters=adapters_in(adapter, model))
    assert with_settings(model, LoraSettings(base="bfloat16")).adapters.base == "bfloat16"
    with pytest.raises(InputError, match="^lora.base is int8, whose kernels have no exact norms"):
        with_settings(model, LoraSettings(base="int8"))
