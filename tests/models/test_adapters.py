"""Adapters: PEFT's numbers (tests/golden/make_adapters.py) and files, merging, bases, refusals."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import load_pretrained, save_adapter, save_pretrained
from rlhf_jax.models.adapters import (
    merge_adapter,
    plain_params,
    unmerge_adapter,
)
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
        found, expected = unmerge_adapter(params, merged), plain_params(params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-7), found, expected)


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
