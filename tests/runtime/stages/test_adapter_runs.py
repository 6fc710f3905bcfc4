"""Runs that train adapters: resumed, exported in both formats, opened again, and refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.models import load_pretrained
from rlhf_jax.models.adapters import frozen_base, plain_params
from rlhf_jax.runtime import train_sft
from rlhf_jax.runtime.commands.generate import run_generate
from rlhf_jax.runtime.config import SFTConfig, resolve
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.run.records import newest_record
from rlhf_jax.runtime.stages.offline import OfflineStage
from tests import small

LORA = {"r": 2, "dropout": 0.1, "target_modules": ["c_attn", "c_fc"], "base": "bfloat16"}


def config_of(folder, base, **sections):
    model = {"path": f"{base}/hf", "n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 256}
    return small.sft(folder, model=model, **{"lora": LORA, **sections})


@pytest.fixture(scope="module")
def run(tmp_path_factory, sft_run):
    folder = tmp_path_factory.mktemp("lora")
    train_sft(config_of(folder, sft_run[0]))
    return folder


def test_a_stopped_run_continues_bit_for_bit_and_holds_adapters_alone(
    tmp_path, monkeypatch, sft_run, run
):
    config = config_of(tmp_path, sft_run[0])
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, OfflineStage, "step", 2)
        with pytest.raises(loop.Interrupted):
            train_sft(config)
    arrays = newest_record(epath.Path(tmp_path))["arrays"]
    names = {name.rpartition("/")[2] for name in arrays if name.startswith("params/")}
    assert names == {"lora_a", "lora_b"}
    assert not any("kernel" in name or "embedding" in name for name in arrays)
    train_sft(config)
    small.assert_same_run(run, tmp_path)


def test_both_exports_are_the_trained_model(sft_run, run, tmp_path):
    base = f"{sft_run[0]}/hf"
    merged_model, merged = load_pretrained(run / "hf")
    model, params = load_pretrained(base, adapter_path=run / "adapter")
    assert dataclasses.replace(model, adapters=None) == merged_model
    in_bfloat16 = dataclasses.replace(model.adapters, base="bfloat16")
    rounded = frozen_base(in_bfloat16, params)  # as in the run
    start = jax.tree.map(lambda x: x.astype("float32"), plain_params(rounded))
    tokens = np.arange(2, 18).reshape(2, 8)
    tuned, same, before = (
        own.logits(tree, own.hidden(tree, tokens))
        for own, tree in ((merged_model, merged), (model, rounded), (merged_model, start))
    )
    np.testing.assert_allclose(tuned, same, atol=1e-5)
    assert np.abs(tuned - before).max() > 1e-3
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    output = tmp_path / "responses.jsonl"
    model_section = {"path": base, "adapter_path": str(run / "adapter")}
    settings = {"generation": {"max_new_tokens": 4, "temperature": 0.0}, "output": str(output)}
    run_generate({"model": model_section, "prompt": "the", **settings})
    (entry,) = small.rows(output)
    assert entry["prompt"] == "the"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"alpha": 8.0}}, "lora.alpha is given, but without lora.r there are no adapters"),
        ({"lora": {"r": 0}}, "lora.r must be above 0, but is 0"),
        ({"lora": {"r": 2, "use_dora": True, "base": "int8"}}, "lora.use_dora needs the norms"),
        ({"model": {"adapter_path": "a", "path": "b"}}, "lora.r is 2, but training goes on with"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(sections, message):
    with pytest.raises(InputError, match=message):
        resolve(SFTConfig, {"lora": {"r": 2}, **sections})
