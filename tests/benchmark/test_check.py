from dataclasses import replace

import numpy as np
import pytest

from rlhf_jax.models import attention
from rlhf_jax.models.readout import cross_entropy_loss
from rlhf_jax.training import sft
from scripts.benchmark import check
from scripts.benchmark.settings import BenchmarkError
from scripts.benchmark.workloads import WORKLOADS

pytestmark = pytest.mark.newest

BLOCK = attention.BLOCK
SMALL = {workload.name: check.small_workload(workload, (7, 5)) for workload in WORKLOADS}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Attention computes several blocks of queries of short sequences too."""
    monkeypatch.setattr(attention, "BLOCK", 4)


def test_workloads_with_the_same_settings_are_checked_once_with_several_blocks():
    distinct = {check.small_workload(workload) for workload in WORKLOADS}
    assert len(distinct) == len(set(SMALL.values())) == 10
    for small_workload in distinct:
        assert small_workload.prompt_length > BLOCK or small_workload.kind == "generate"
        assert small_workload.response_length > BLOCK or small_workload.kind not in (
            "reward",
            "dpo",
        )


# A shared base, two epochs of PPO, of which the second clips, sampled tokens, and a Llama. The
# command checks all its workloads before it measures.
STEPS = ["dpo_mid", "ppo_shared_mid", "grpo_mid", "sft_smollm2"]


@pytest.mark.parametrize("name", STEPS)
def test_steps_equal_the_plain_path(name):
    small_workload = SMALL[name]
    if small_workload.num_layers_unfrozen is None:  # the others have several layers
        small_workload = replace(small_workload, n_layer=1)
    result = check.difference(small_workload)
    assert result.loss < 1e-5
    assert result.gradients < 1e-4


def test_greedy_tokens_and_logprobs_are_those_of_full_passes():
    result = check.difference(replace(SMALL["generate_smollm2"], n_layer=1, response_length=3))
    assert result.loss < 1e-5
    assert result.gradients == 0.0


def wrong_loss(model, params, hidden, *others, **terms):
    return cross_entropy_loss(model, params, hidden * 1.001, *others, **terms)


def wrong_blocks(softcap, queries, k, v, block, *others, right=attention._block_backward):
    """Gradients that are wrong in all blocks but the first."""
    for_q, for_k, for_v = right(softcap, queries, k, v, block, *others)
    return for_q, for_k, for_v * (1.001 if block.start else 1.0)


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [(sft, "cross_entropy_loss", wrong_loss), (attention, "_block_backward", wrong_blocks)],
)
def test_a_wrong_loss_or_gradient_ends_the_command(monkeypatch, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    one_layer = replace(SMALL["sft_mid"], n_layer=1)
    monkeypatch.setattr(check, "small_workload", lambda workload: one_layer)
    with pytest.raises(BenchmarkError, match="the check of sft failed: loss and gradients differ"):
        check.check_all(WORKLOADS[:1])


def test_differences_are_relative_to_each_leaf():
    assert check.relative([[1.0, 100.0], [2.0]], [[1.0, 100.0], [1.0]]) == pytest.approx(1.0)
    # A leaf that is nearly 0 beside the others differs by rounding.
    assert check.relative([1000.0, 1e-6], [1000.0, 0.0]) == pytest.approx(1e-6)
    assert np.isnan(check.relative([np.nan], [1.0]))
    with pytest.raises(BenchmarkError):
        check._assert_close(check.Difference("x", float("nan"), 0.0))
