"""Ten steps of fine-tuning equal PyTorch's (tests/golden/make_decoder_training.py)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import TextBatch
from rlhf_jax.models import load_pretrained, readout
from rlhf_jax.training import sft
from rlhf_jax.training.settings import OptimizerSettings
from rlhf_jax.training.state import make_optimizer
from tests.models.test_decoder_parity import write_folder
from tests.versions import newest

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "decoder_training.npz")
OPTIMIZER = OptimizerSettings(
    learning_rate=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=2.0
)


@pytest.mark.parametrize(
    ("case", "linear"), [("llama_tied", True), *newest(("llama_scaled", False), ("qwen3", True))]
)
def test_ten_adamw_steps_equal_those_of_pytorch(case, linear, tmp_path, monkeypatch):
    monkeypatch.setattr(readout, "LINEAR_VOCABULARY", 1 if linear else 10**9)
    write_folder(tmp_path, json.loads(str(GOLDEN[f"{case}/config"])))
    model, params = load_pretrained(tmp_path)
    settings, key = sft.Settings(dropout=False), jax.random.key(0)
    optimizer = make_optimizer(OPTIMIZER, models=(model,))
    state = sft.init_state(model, params, settings, key, optimizer=optimizer)
    step = jax.jit(sft.make_step(model, settings, optimizer=optimizer))
    tokens, mask = GOLDEN["tokens"], GOLDEN["mask"]
    batches = [TextBatch(t, m.astype(np.int32), m) for t, m in zip(tokens, mask, strict=True)]
    losses, norms = [], []
    for number in range(10):
        state, metrics = step(state, batches[number % 2], key)
        losses.append(metrics["train/loss"])
        norms.append(metrics["train/grad_norm"])
    np.testing.assert_allclose(losses, GOLDEN[f"{case}/losses"], rtol=1e-4)
    # Adam makes steps of the rounding of gradients that are nearly 0, which moves single logits.
    np.testing.assert_allclose(norms, GOLDEN[f"{case}/norms"], rtol=1e-3)
    assert np.max(norms) > OPTIMIZER.max_grad_norm
    hidden = model.hidden(state.params, jnp.asarray(tokens[0]), mask[0])
    error = np.abs(model.logits(state.params, hidden) - GOLDEN[f"{case}/logits"])[mask[0]]
    assert error.max() < 5e-3
