"""The texts of PPO-ptx in a run: where they are from, their order, and what they cost."""

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands import pipeline
from rlhf_jax.runtime.config import PPOConfig, RLHFConfig, resolve
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small

TEXTS = {"builtin_rows": 32, "eval_rows": 8, "max_length": 48, "packing": False}


def stage_of(folder, sft_run, **ptx):
    sections = {"ppo": {"ptx_coef": 0.5, "ptx_batch_size": 4}, "ptx": {**TEXTS, **ptx}}
    config = small.ppo(folder, sft_run[0], **sections)
    return OnlineStage(resolve(PPOConfig, config), small.short_response)


@pytest.fixture(scope="module")
def stage(tmp_path_factory, sft_run):
    return stage_of(tmp_path_factory.mktemp("ptx"), sft_run)


def test_texts_are_read_in_an_order_of_their_own(stage):
    texts, prompts = stage.texts, stage.batches
    assert texts.num_examples == prompts.num_examples == 32
    seen = np.concatenate([texts.indices(step) for step in range(8)])
    assert sorted(seen) == list(range(32))
    assert seen.tolist() != np.concatenate([prompts.indices(step) for step in range(4)]).tolist()
    np.testing.assert_array_equal(texts.at(3).tokens, texts.examples.tokens[texts.indices(3)])


def test_texts_count_for_the_share_of_the_peak_and_not_for_the_tokens(stage):
    real, targets = stage.texts.examples.segments > 0, stage.texts.examples.loss_mask
    layers = stage.model.flops_per_token(stage.params, unembeds=False)
    table = stage.model.flops_per_token(stage.params, unembeds=True) - layers
    mean = layers * real.sum(axis=1).mean() + table * targets.sum(axis=1).mean()
    expected = 3 * 2 * mean * 4  # two epochs, four texts
    assert stage.flops_per_step == pytest.approx(expected)


def test_texts_longer_than_the_model_has_positions_are_refused(tmp_path, sft_run):
    with pytest.raises(InputError, match="ptx.max_length = 65 exceeds the model's n_positions"):
        stage_of(tmp_path, sft_run, max_length=65)


def test_of_all_three_stages_it_reads_the_texts_of_the_first_unless_others_are_given():
    values = small.rlhf("run", ppo={"ptx_coef": 0.5})
    config = resolve(RLHFConfig, values)
    assert pipeline.stage_configs(config)[-1].section("ptx") == config.data.sft
    values["data"]["ptx"] = {"path": "texts.jsonl"}
    config = resolve(RLHFConfig, values)
    assert pipeline.stage_configs(config)[-1].section("ptx") == config.data.ptx != config.data.sft
