"""Runs that train adapters: resumed, exported in both formats, opened again, and refused."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import (
    LoraSettings,
    ModelSettings,
    load_pretrained,
    load_reward_model,
    save_pretrained,
)
from rlhf_jax.models.adapters import frozen_base, plain_params
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.runtime import (
    loading,
    run_rlhf,
    train_dpo,
    train_grpo,
    train_rft,
    train_sft,
)
from rlhf_jax.runtime.commands import pipeline
from rlhf_jax.runtime.commands.generate import run_generate
from rlhf_jax.runtime.config import RLHFConfig, SFTConfig, resolve
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.run.records import newest_record
from rlhf_jax.runtime.stages.offline import OfflineStage
from rlhf_jax.runtime.stages.online import OnlineStage
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


@pytest.mark.newest
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


QUIET = {"eval_every": 0, "samples_every": 0}
SHORT = {"rewards": [{"function": "tests.small:short_response"}]}


@pytest.mark.newest
@pytest.mark.parametrize(
    ("train", "config", "stage", "metric"),
    [
        (train_rft, small.rft, OfflineStage, None),
        (train_grpo, functools.partial(small.grpo, grpo={"beta": 0.1}, **SHORT), OnlineStage,
         "objective/kl"),
    ],
    ids=["rft", "grpo"],
)  # fmt: skip
def test_other_trainers_begin_at_the_base_and_continue_bit_for_bit(
    train, config, stage, metric, tmp_path, monkeypatch, sft_run
):
    sections = {"lora": {"r": 2, "target_modules": ["c_attn"]}, "logging": QUIET}
    folders = [tmp_path / name for name in ("full", "stopped")]
    configs = [config(folder, sft_run[0], **sections) for folder in folders]
    train(configs[0])
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, stage, "step", 2)
        with pytest.raises(loop.Interrupted):
            train(configs[1])
    train(configs[1])
    steps = small.metrics_by_step(folders[0])
    small.assert_same_run(*folders, step=max(steps))
    if metric is not None:
        # GRPO's log-probabilities are those of sampling, which rounds otherwise.
        assert steps[1][metric] == pytest.approx(0.0, abs=1e-6)
        assert abs(steps[max(steps)][metric]) > 1e-6
    base = f"{sft_run[0]}/hf"
    model, params = load_pretrained(base, adapter_path=folders[0] / "adapter")
    jax.tree.map(np.testing.assert_array_equal, plain_params(params), load_pretrained(base)[1])
    assert np.abs(params["layers"]["attn"]["c_attn"]["lora_b"]).max() > 0


def test_all_stages_in_a_row_train_adapters(tmp_path, sft_run):
    sizes = dataclasses.asdict(ModelSettings(path=f"{sft_run[0]}/hf"))
    sections = {"model": sizes, "tokenizer": {"vocab_size": 8192}, "logging": QUIET}
    config = small.rlhf(tmp_path, **sections, lora={"r": 2, "base": "bfloat16"})
    run_rlhf(config)
    assert small.metrics_by_step(tmp_path / "ppo")[1]["objective/kl"] == 0.0
    bases = []
    for stage in ("sft", "reward", "ppo"):
        written = json.loads((tmp_path / stage / "adapter" / "adapter_config.json").read_text())
        bases.append(written["base_model_name_or_path"])
    assert bases == [sizes["path"], *[f"{tmp_path}/sft/hf"] * 2]
    adapter = tmp_path / "reward" / "adapter"
    _, params = load_reward_model(f"{tmp_path}/sft/hf", adapter_path=adapter)
    _, merged = load_reward_model(tmp_path / "reward" / "hf")
    np.testing.assert_array_equal(params["head"]["kernel"], merged["head"]["kernel"])

    again = {**config, "lora": {"base": "int8"}, "run_dir": f"{tmp_path}/again"}
    again["model"] = {**sizes, "adapter_path": f"{tmp_path}/sft/adapter"}
    stages = pipeline.stage_configs(resolve(RLHFConfig, again))
    assert [stage.lora.base for stage in stages] == ["int8", "float32", "float32"]


@pytest.mark.newest
def test_a_changed_base_and_a_dropout_that_is_not_read(tmp_path, sft_run, run):
    """A run is not continued on another base; a dropout is refused where there is none to be."""
    with pytest.raises(InputError, match="lora.dropout is 0.1, but dpo trains without dropout"):
        train_dpo(small.dpo(tmp_path, sft_run[0], lora={"r": 2, "dropout": 0.1}))
    base = shutil.copytree(f"{sft_run[0]}/hf", tmp_path / "base" / "hf")
    model = {"adapter_path": str(run / "adapter")}
    sections = {"model": model, "data": {"eval_rows": 0}, "logging": QUIET}
    settings = {"num_epochs": 1, "precompute_ref": False}  # else the reference is checked first
    config = small.dpo(tmp_path / "dpo", base.parent, **sections, dpo=settings)
    train_dpo(config)  # goes on with adapters that have a dropout
    model, params = load_pretrained(base)
    params["wpe"]["embedding"] += 1.0
    save_pretrained(base, model, params)
    config["dpo"] = {**config["dpo"], "num_epochs": 2}
    with pytest.raises(InputError, match="is not the one that the run in .* began with"):
        train_dpo(config)


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
    (entry,) = small.entries(output)
    assert entry["prompt"] == "the"


@pytest.mark.parametrize("base", ["bfloat16", "int8"])
def test_a_base_is_converted_as_it_is_read(base, sft_run, monkeypatch):
    """To the same arrays as one in memory, of which no more than one is float32 at a time."""
    lora = LoraSettings(r=2, base=base, modules_to_save=("c_fc",), target_modules=("c_attn",))
    settings, key = ModelSettings(path=f"{sft_run[0]}/hf"), jax.random.key(0)
    mesh, tokenizer = make_mesh(MeshSettings()), load_tokenizer(settings.path)
    model, params = loading.load_model(settings, tokenizer, key, mesh)
    expected_model, expected = loading.add_adapters(model, params, lora, key, mesh)
    convert, held = loading._frozen, []

    def counted(place, base, path, module):
        held.append(sum(x.dtype == "float32" and x.nbytes > 2000 for x in jax.live_arrays()))
        return convert(place, base, path, module)

    before = sum(x.dtype == "float32" and x.nbytes > 2000 for x in jax.live_arrays())
    monkeypatch.setattr(loading, "_frozen", counted)
    model, params = loading.load_model(settings, tokenizer, key, mesh, lora)
    assert len(held) > 5
    assert max(held) - before <= 2  # the module that is trained, and another one
    model, params = loading.add_adapters(model, params, lora, key, mesh)
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, params, expected)


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
