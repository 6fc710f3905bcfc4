"""Runs whose lower layers are frozen, and whose values come from a model of their own."""

import dataclasses

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.huggingface import load_pretrained, load_reward_model, save_pretrained
from rlhf_jax.runtime import run_rlhf, train_ppo, train_reward
from rlhf_jax.runtime.config import PPOConfig, resolve
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages.offline import OfflineStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small


@pytest.fixture(scope="module")
def policy(tmp_path_factory, sft_run):
    """A folder with the model of `sft_run`, its layer taken twice."""
    folder = tmp_path_factory.mktemp("two-layers")
    model, params = load_pretrained(sft_run[0] / "hf")
    model = GPT2(dataclasses.replace(model.config, n_layer=2))
    params["layers"] = jax.tree.map(lambda x: np.concatenate([x, 0.9 * x]), params["layers"])
    tokenizer = AutoTokenizer.from_pretrained(sft_run[0] / "hf")
    save_pretrained(folder / "hf", model, params, tokenizer)
    return folder


def in_two_parts(monkeypatch, stage, train):
    """Runs `train("full")`, and `train("parts")` with an interrupt after its second step."""
    train("full")
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, stage, "step", 2)
        with pytest.raises(loop.Interrupted, match="after step 2 of 4"):
            train("parts")
    train("parts")


def assert_lower_kept(model, before, after, unfrozen):
    lower, upper = model.split(before, unfrozen)
    kept, moved = model.split(after, unfrozen)
    jax.tree.map(np.testing.assert_array_equal, kept, lower)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (upper, moved)), strict=True))


@pytest.mark.newest
def test_ppo_goes_on_and_exports_the_lower_layers_as_they_were(
    tmp_path, monkeypatch, policy, reward_run
):
    options = {"num_layers_unfrozen": 1, "value_model": "reward"}

    def train(name):
        train_ppo(small.ppo(tmp_path / name, policy, reward_run[0], ppo=options))

    in_two_parts(monkeypatch, OnlineStage, train)
    small.assert_same_run(tmp_path / "full", tmp_path / "parts")
    model, before = load_pretrained(policy / "hf")
    _, after = load_pretrained(tmp_path / "full" / "hf")
    assert_lower_kept(model, before, after, 1)
    saved = small.checkpoint(tmp_path / "full")
    assert set(saved["frozen"]) == {"fingerprint"}
    assert set(saved["params"]["model"]) == {"layers", "ln_f"}
    # The value model is trained in full, from another architecture.
    _, scorer = load_reward_model(reward_run[0] / "hf")
    own = saved["params"]["value_model"]
    assert jax.tree.map(np.shape, own["model"]) == jax.tree.map(np.shape, scorer["model"])
    assert (own["model"]["wpe"]["embedding"] != scorer["model"]["wpe"]["embedding"]).any()
    assert float(own["head"]["bias"]) != 0.0
    metrics = small.entries(tmp_path / "full" / "metrics.jsonl")
    assert abs(metrics[0]["objective/kl"]) < 1e-5


@pytest.mark.newest
def test_a_reward_model_goes_on_and_exports_the_lower_layers_as_they_were(
    tmp_path, monkeypatch, policy
):
    """With no layer left to train: norm and head alone, and stacks without layers are saved.

    Normalized too, which moves what is trained and reads the rest.
    """

    def train(name):
        options = {"num_layers_unfrozen": 0, "normalize_before": True, "normalize_after": True}
        train_reward(small.reward(tmp_path / name, policy, reward=options))

    in_two_parts(monkeypatch, OfflineStage, train)
    small.assert_same_run(tmp_path / "full", tmp_path / "parts")
    _, before = load_pretrained(policy / "hf")
    model, after = load_reward_model(tmp_path / "full" / "hf")
    # The exported vocabulary has one row more, for a token that pads.
    size = before["wte"]["embedding"].shape[0]
    after["model"]["wte"]["embedding"] = after["model"]["wte"]["embedding"][:size]
    lower, upper = model.split(before, 0)
    jax.tree.map(np.testing.assert_array_equal, model.split(after["model"], 0)[0], lower)
    assert (after["model"]["ln_f"]["scale"] != upper["ln_f"]["scale"]).any()
    saved = small.checkpoint(tmp_path / "full")
    assert set(saved["frozen"]) == {"fingerprint"}


def test_flops_count_frozen_layers_once(policy, reward_run, tmp_path):
    """By hand: D = 32, 12 D^2 weights in a layer, and V = 300 padded to 384."""

    def stage(**options):
        config = small.ppo(tmp_path, policy, reward_run[0], ppo=options)
        return OnlineStage(resolve(PPOConfig, config))

    def flops(**options):
        return pytest.approx(stage(**options).flops_per_token, rel=1e-6)

    prompts = stage().batches.examples.prompt_mask.sum(axis=1).mean()
    layer, table = 12 * 32 * 32, 384 * 32 * 8 / (prompts + 8)  # logits of the responses alone
    reward = layer + 32
    full = 2 * layer + table
    assert flops() == 2 * (3 * full + reward) + 2 * 6 * full
    above = layer + table  # of which the table is frozen
    forwards = 2 * layer + 3 * above + reward + reward
    backwards = 2 * (6 * (layer + reward) + 4 * table)
    assert flops(num_layers_unfrozen=1, value_model="reward") == 2 * forwards + backwards


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ppo": {"num_layers_unfrozen": 3}},
            "ppo.num_layers_unfrozen must be from 0 to the model's n_layer = 2, but is 3",
        ),
        (
            {"ppo": {"value_model": "reward"}, "model": {"reward_path": None}},
            "needs a reward model to start from: give --model.value_path",
        ),
        (
            {"ppo": {"value_model": "policy"}, "model": {"value_path": "somewhere"}},
            "model.value_path is read by ppo.value_model reward alone, but that is policy",
        ),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_before_work_starts(tmp_path, policy, changes, message):
    config = small.ppo(tmp_path / "run", policy, policy, **changes)
    with pytest.raises(InputError, match=message):
        train_ppo(config, small.short_response)


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_all_stages_are_checked_before_the_first(tmp_path, stage):
    config = small.rlhf(tmp_path, **{stage: {"num_layers_unfrozen": 2}})
    message = f"{stage}.num_layers_unfrozen must be from 0 to the model's n_layer = 1, but is 2"
    with pytest.raises(InputError, match=message):
        run_rlhf(config)
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()
