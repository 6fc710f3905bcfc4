from dataclasses import replace

import numpy as np
import pytest

from rlhf_jax.functional import cross_entropy_loss
from rlhf_jax.models import attention
from rlhf_jax.training import sft
from scripts.benchmark import check
from scripts.benchmark.settings import BenchmarkError
from scripts.benchmark.workloads import WORKLOADS

BLOCK = attention.BLOCK
FORMS = {workload.name: check.small_form(workload, (7, 5)) for workload in WORKLOADS}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Rows as short as these have several blocks of queries, too."""
    monkeypatch.setattr(attention, "BLOCK", 4)


def test_mid_and_small_are_checked_once_and_with_rows_of_several_blocks():
    forms = {check.small_form(workload) for workload in WORKLOADS}
    assert len(forms) == len(set(FORMS.values())) == 6
    for form in forms:
        assert form.prompt_length > BLOCK or form.kind == "generate"
        assert form.response_length > BLOCK or form.kind != "reward"


# The frozen half, a shared trunk, sampled tokens, and two epochs, of which the second clips.
@pytest.mark.parametrize("name", ["reward_frozen_small", "ppo_shared_mid"])
def test_steps_give_what_the_plain_path_gives(name):
    found = check.difference(FORMS[name])
    assert found.loss < 1e-5
    assert found.gradients < 1e-4


def test_greedy_tokens_and_logprobs_are_those_of_whole_passes():
    form = replace(FORMS["generate_mid"], n_layer=1, response_length=3)
    found = check.difference(form)
    assert found.loss < 1e-5
    assert found.gradients == 0.0


def wrong_loss(logits, targets, mask, **others):
    return cross_entropy_loss(logits * 1.001, targets, mask, **others)


def wrong_blocks(given, k, v, rows, *others, plain=attention._block_backward):
    """Of all queries but those of the first block."""
    for_q, for_k, for_v = plain(given, k, v, rows, *others)
    return for_q, for_k, for_v * (1.001 if rows.start else 1.0)


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [(sft, "cross_entropy_loss", wrong_loss), (attention, "_block_backward", wrong_blocks)],
)
def test_what_is_broken_ends_the_command(monkeypatch, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    form = replace(FORMS["sft_mid"], n_layer=1)
    monkeypatch.setattr(check, "small_form", lambda workload: form)
    with pytest.raises(BenchmarkError, match="the check of sft failed: loss and gradients differ"):
        check.check_all(WORKLOADS[:1])


def test_differences_are_relative_to_each_leaf():
    assert check.relative([[1.0, 100.0], [2.0]], [[1.0, 100.0], [1.0]]) == pytest.approx(1.0)
    # What is all but zero beside the others is rounding.
    assert check.relative([1000.0, 1e-6], [1000.0, 0.0]) == pytest.approx(1e-6)
    assert np.isnan(check.relative([np.nan], [1.0]))
    with pytest.raises(BenchmarkError):
        check._judge(check.Difference("x", float("nan"), 0.0))
