"""Loading of the stages: keys, checksums, folders behind an address."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.settings import TokenizerSettings
from rlhf_jax.data.tokenizers import load_tokenizer, train_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.huggingface import save_pretrained, save_reward_model
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import tree_shardings
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.rollout.settings import GenerationSettings
from rlhf_jax.runtime import loading
from rlhf_jax.runtime.config import PPOConfig, SFTConfig
from rlhf_jax.runtime.evaluation.responses import sampler
from rlhf_jax.runtime.run.records import fingerprint
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.checks import check_run
from rlhf_jax.runtime.stages.offline import prompt_of
from rlhf_jax.training.ppo_settings import Settings as PPOSettings
from rlhf_jax.training.sft_settings import Settings as SFTSettings


def test_no_two_stages_share_a_key():
    keys = [
        tuple(np.asarray(jax.random.key_data(key)).tolist())
        for seed in (0, 1)
        for stage in ("sft", "reward", "ppo")
        for key in shared.stage_keys(seed, stage)
    ]
    assert len(set(keys)) == len(keys) == 18


def test_a_fingerprint_sees_each_bit_and_each_place():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}
    same = jax.tree.map(jnp.copy, tree)
    changed = [
        {**tree, "a": tree["a"].at[1, 2].set(jnp.nextafter(5.0, 6.0))},
        {**tree, "a": tree["a"].at[0, 0].set(-0.0)},
        {**tree, "a": tree["a"][::-1]},
        {**tree, "b": {"c": jnp.ones(4).at[3].set(2.0)}},
        {"a": tree["a"]},
    ]
    prints = [int(fingerprint(each)) for each in (tree, same, *changed)]
    assert prints[0] == prints[1]
    assert all(a != b for a, b in itertools.combinations(prints[1:], 2))


def test_a_folder_behind_an_address_is_copied_and_a_local_one_is_not(tmp_path, monkeypatch):
    """A local folder stands in for the bucket."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with loading.local_folder(str(tmp_path)) as folder:
        assert folder == str(tmp_path)
    path_of = epath.Path
    monkeypatch.setattr(
        loading.epath,
        "Path",
        lambda path: path_of(str(path).replace("gs://bucket", str(tmp_path))),
    )
    with loading.local_folder("gs://bucket/hf") as folder:
        assert (Path(folder) / "config.json").read_text() == "{}"
        assert not folder.startswith(str(tmp_path))
    assert not Path(folder).exists()


@pytest.mark.newest
def test_a_model_has_the_special_tokens_of_its_tokenizer(tmp_path, caplog):
    tokenizer = train_tokenizer(["a b"] * 2, 300)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = GPT2Config(len(tokenizer), 8, 8, 1, 1, eos_token_id=3, pad_token_id=0)
    saved = GPT2(config, generation_config={"eos_token_id": [3, pad], "top_k": 7})
    save_pretrained(tmp_path, saved, saved.init(jax.random.key(0)))
    settings, mesh = ModelSettings(path=str(tmp_path)), make_mesh(MeshSettings())
    model, params = loading.load_model(settings, tokenizer, jax.random.key(0), mesh)
    assert model.config == dataclasses.replace(
        config, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad
    )
    assert model.stop_token_ids == (eos, pad)
    assert "eos_token_id 3 and not" in caplog.records[0].message
    assert len(caplog.records) == 1
    # Every response ends with the first token if all of them are stop tokens.
    ids = {"eos_token_id": list(range(len(tokenizer)))}
    model = dataclasses.replace(model, generation_config=ids)
    sample = sampler(model, GenerationSettings(max_new_tokens=4))
    prompts = np.zeros((2, 3), np.int32)
    rollout = sample(params, PromptBatch(prompts, prompts == 0, np.arange(2)), jax.random.key(0))
    assert np.asarray(rollout.mask).sum(axis=1).tolist() == [1, 1]


def test_a_vocabulary_is_as_large_as_its_highest_id():
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 9}, __len__=lambda: 2)
    loading.check_vocabulary(GPT2(GPT2Config(10, 8, 8, 1, 1)), tokenizer, "here")
    with pytest.raises(InputError, match="The tokenizer has 10 tokens, but the model in here has"):
        loading.check_vocabulary(GPT2(GPT2Config(9, 8, 8, 1, 1)), tokenizer, "here")


def test_a_chat_template_of_the_settings_stays_with_the_tokenizer(tmp_path):
    template = "{% for turn in messages %}[{{ turn['content'] }}]{% endfor %}"
    settings = TokenizerSettings(vocab_size=258, chat_template=template)
    tokenizer = loading.choose_tokenizer(settings, None, lambda: ["a", "b"])
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi."}]
    row = {"prompt": messages, "completion": [{"role": "assistant", "content": "Ho."}]}
    assert prompt_of(row, 1, load_tokenizer(tmp_path)) == "[Hi.]"
    assert shared.text_of(row) == "Hi.Ho."
    assert shared.text_of({"responses": ["a", messages]}) == "aHi."
    # Another template takes the place of that in the folder.
    other = TokenizerSettings(path=str(tmp_path), chat_template="{{ messages[0]['content'] }}")
    assert prompt_of(row, 1, loading.choose_tokenizer(other, None, list)) == "Hi."


def test_models_are_initialised_sharded_with_the_settings(tmp_path, monkeypatch):
    """Fresh ones, those of a folder, and reward models."""
    tokenizer = loading.choose_tokenizer(TokenizerSettings(vocab_size=258), None, lambda: ["ab"])
    mesh, key = make_mesh(MeshSettings()), jax.random.key(0)
    settings = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "remat": "full"}
    model, params = loading.load_model(ModelSettings(**settings), tokenizer, key, mesh)
    scorer = {"model": params, "head": {"kernel": jnp.ones(8)}}
    save_reward_model(tmp_path, model, scorer, tokenizer)
    of_folder = ModelSettings(remat="dots", attention="cudnn", dtype="bfloat16")
    with pytest.raises(InputError, match="model.attention cudnn needs an NVIDIA GPU, but JAX runs"):
        loading.load_reward(str(tmp_path), of_folder, None, mesh)
    monkeypatch.setattr(loading, "check_device", lambda name: None)
    scoring_model, scorer, _ = loading.load_reward(str(tmp_path), of_folder, None, mesh)
    assert (model.remat, scoring_model.remat) == ("full", "dots")
    assert (model.attention, scoring_model.attention) == ("blocks", "cudnn")
    for tree in (params, scorer):
        assert jax.tree.map(lambda leaf: leaf.sharding, tree) == tree_shardings(
            mesh, tree, model.partition_rules
        )
    expected = jax.jit(model.init)(key)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    jax.tree.map(np.testing.assert_array_equal, scorer["model"], expected)


def test_a_host_that_is_not_the_first_copies_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shared.hosts, "is_first", lambda: False)
    given = []
    shared.export("gs://bucket/run", lambda *arguments: given.append(arguments), "model", "params")
    assert given == [("gs://bucket/run/hf", "model", "params")]


def test_dropout_with_cudnn_is_refused_before_the_data_is_read():
    """And is none where there is no dropout."""
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1})
    sizes = GPT2Config(n_positions=4096, n_embd=16, n_head=2, attn_pdrop=0.1)
    model = GPT2(sizes, "bfloat16", attention="cudnn")
    with pytest.raises(InputError, match=r"sft\.dropout false\), or set model.attention to blocks"):
        check_run(SFTConfig(), model, mesh)
    check_run(SFTConfig(sft=SFTSettings(dropout=False)), model, mesh)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"batch_size": 8, "gradient_accumulation_steps": 2},
            "ppo.batch_size / ppo.num_mini_batches / ppo.gradient_accumulation_steps = 2 is not",
        ),
        ({"batch_size": 16, "score_batch_size": 2}, "ppo.score_batch_size = 2 is not divisible"),
        (
            {"batch_size": 16, "ptx_batch_size": 4, "ptx_coef": 1.0},
            "ppo.ptx_batch_size / ppo.num_mini_batches = 2 is not divisible by mesh data x",
        ),
    ],
)
def test_parts_of_ppo_have_to_fit_the_mesh(values, message):
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 1})
    model = GPT2(GPT2Config(n_positions=4096, n_embd=16, n_layer=2, n_head=2))
    config = PPOConfig(ppo=PPOSettings(num_mini_batches=2, **values))
    with pytest.raises(InputError) as error:
        check_run(config, model, mesh)
    assert str(error.value).startswith(message)
