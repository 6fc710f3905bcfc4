"""Decoders against PyTorch's: numbers of tests/golden/make_decoders.py."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.models import load_pretrained, save_pretrained
from rlhf_jax.models.huggingface import described_model, language_model_slots
from rlhf_jax.rollout import generate
from tests.golden.decoder_weights import direction, weights
from tests.versions import newest

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "decoders.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files if "/" in name})
BOTH_ENDS = ("gemma2", "llama_llama3", "olmo2")  # the other cases run on the newest end alone


def write_folder(folder, config, dtype=np.float32):
    """The tensors of a folder as transformers would write it, with the weights of golden runs."""
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, slot in language_model_slots(described_model(folder)).items():
        tensors[name] = weights(name, slot.shape)
        if "norm" in name:
            tensors[name] += np.float32(not config["model_type"].startswith("gemma"))
    stored = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    return tensors


def slope(grads, name, slot):
    """The gradient of a tensor along the direction of its golden number."""
    leaf = grads
    for key in slot.path:
        leaf = leaf[key]
    leaf = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
    leaf = (leaf.T if slot.transposed else leaf)[: slot.shape[0]]
    return np.sum(leaf * direction(name, slot.shape))


@pytest.mark.parametrize("case", [*BOTH_ENDS, *newest(*(x for x in CASES if x not in BOTH_ENDS))])
def test_decoders_equal_those_of_pytorch(case, tmp_path):
    config = json.loads(str(GOLDEN[f"{case}/config"]))
    tensors = write_folder(tmp_path, config)
    model, params = load_pretrained(tmp_path)
    tokens, slopes = GOLDEN["tokens"], json.loads(str(GOLDEN[f"{case}/slopes"]))
    assert slopes.keys() == tensors.keys()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, mask):
        logits = model.logits(params, model.hidden(params, tokens, mask))
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]
        return -jnp.mean(picked, where=mask[:, 1:]), logits

    outputs = {side: loss(params, GOLDEN[side]) for side in ("left", "right")}
    for side, ((_, logits), _) in outputs.items():
        error = np.abs(logits - GOLDEN[f"{case}/{side}"])[GOLDEN[side]]
        assert error.max() < 2e-5

    (value, _), grads = outputs["right"]
    np.testing.assert_allclose(value, GOLDEN[f"{case}/loss"], atol=1e-5)
    for name, slot in language_model_slots(model).items():
        np.testing.assert_allclose(slope(grads, name, slot), slopes[name], atol=2e-5)
    rollout = generate(
        model, params, tokens, GOLDEN["left"], jax.random.key(0), max_new_tokens=8, temperature=0
    )
    np.testing.assert_array_equal(rollout.tokens, GOLDEN[f"{case}/greedy"])

    save_pretrained(tmp_path / "saved", model, params)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    ours = ("architectures", "dtype", "torch_dtype")
    assert [key for key in config if key not in ours and saved[key] != config[key]] == []
    again, same = load_pretrained(tmp_path / "saved")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize("case", [name[:-9] for name in GOLDEN.files if name.endswith("/bfloat16")])
def test_decoders_in_bfloat16_are_as_near_as_those_of_pytorch(case, tmp_path):
    """Logits of up to 4: within 0.1 of PyTorch's, and as near to those in float32 as its are."""
    write_folder(tmp_path, json.loads(str(GOLDEN[f"{case}/config"])), jnp.bfloat16)
    tokens, mask = GOLDEN["tokens"], GOLDEN["right"]
    theirs, exact = GOLDEN[f"{case}/bfloat16"][mask], GOLDEN[f"{case}/of_bfloat16"][mask]
    logits = {}
    for dtype in ("bfloat16", "float32"):
        model, params = load_pretrained(tmp_path, dtype=dtype)
        hidden = model.hidden(params, tokens, mask)
        assert hidden.dtype == dtype
        logits[dtype] = np.asarray(model.logits(params, hidden))[mask]
    assert np.abs(logits["float32"] - exact).max() < 2e-5
    assert np.abs(logits["bfloat16"] - theirs).max() < 0.1
    error, their_error = (np.sqrt(np.mean((x - exact) ** 2)) for x in (logits["bfloat16"], theirs))
    assert error < 1.1 * their_error
