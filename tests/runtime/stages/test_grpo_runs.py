"""Runs of GRPO: one program with a reward model, rewards in Python apart, groups without spread."""

import json
import logging
import shutil

import numpy as np
import pytest
import yaml

from rlhf_jax.errors import InputError
from rlhf_jax.runtime import train_grpo, train_rloo
from rlhf_jax.runtime.commands import main
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages import groups
from rlhf_jax.runtime.stages.groups import GroupStage
from tests import small


def test_the_command_trains_reports_and_continues_bit_for_bit(
    tmp_path, monkeypatch, capsys, sft_run, reward_run
):
    policy = shutil.copytree(sft_run[0] / "hf", tmp_path / "policy" / "hf")
    full, stopped = (
        small.grpo(tmp_path / name, policy.parent, reward_run[0]) for name in ("one", "two")
    )
    programs, finish = [], GroupStage.finish

    def counted(self, state):
        programs.append(self._step._cache_size())
        assert set(state.frozen) == {"reward"}
        return finish(self, state)

    monkeypatch.setattr(GroupStage, "finish", counted)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(full))
    assert main.main(["grpo", "--config", str(tmp_path / "run.yaml")]) == 0
    assert "win rate by the score" in capsys.readouterr().out
    assert programs == [1]
    first = small.metrics_by_step(tmp_path / "one")[1]
    assert first[f"rewards/{reward_run[0].name}/mean"] == first["reward"]
    assert first["sampling/sampling_logp_difference/max"] < 2e-5
    assert "objective/scores" not in first
    assert "GRPO" in (tmp_path / "one" / "report.html").read_text()
    evaluation = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    # The initial policy is read again to compare with.
    assert {"win_rate_scores", "kl", "scores"} <= set(evaluation["metrics"])
    assert evaluation["metrics"]["kl"] != 0

    with monkeypatch.context() as patch:
        small.interrupt_in(patch, GroupStage, "step", 2)
        with pytest.raises(loop.Interrupted):
            train_grpo(stopped)
    weights = policy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 128]))  # the sign of a number
    with pytest.raises(InputError, match=f"^The model in {policy} changed since the run in"):
        train_grpo(stopped)
    weights.write_bytes(content)
    train_grpo(stopped)
    small.assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.newest
def test_rewards_in_python_are_shown_and_normalized_apart(tmp_path, sft_run):
    sources = [
        {"function": "tests.small:short_response", "name": "short"},
        {"function": "tests.small:short_response", "name": "again", "weight": 0.5},
    ]
    options = {"multi_objective_aggregation": "normalize_then_sum", "total_episodes": 48}
    data = {"eval_rows": 0}
    config = small.grpo(tmp_path, sft_run[0], grpo=options, rewards=sources, data=data)
    metrics = train_grpo(config).metrics
    assert metrics["rewards/short/mean"] == metrics["rewards/again/mean"] < 0
    assert metrics["reward"] == pytest.approx(1.5 * metrics["rewards/short/mean"], rel=1e-5)
    assert metrics["rewards/short/std"] > 0


@pytest.mark.newest
def test_rloo_has_a_reference_and_warns_where_no_scores_differ(
    tmp_path, sft_run, monkeypatch, caplog
):
    monkeypatch.setattr(groups, "PATIENCE", 2)
    config = small.grpo(tmp_path, sft_run[0], data={"eval_rows": 0})
    config["rloo"] = config.pop("grpo") | {"num_generations": 2, "total_episodes": 32}

    def constant(prompts, completions, **columns):
        return [0.5] * len(completions)

    with caplog.at_level(logging.WARNING, "rlhf_jax"):
        metrics = train_rloo(config, constant).metrics
    assert "all 2 responses to every prompt had equal scores, from which rloo" in caplog.text
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["rewards/constant/mean"] == 0.5
    assert np.isfinite(metrics["kl"])


def differs_for_some(prompts, completions, **columns):
    """A reward whose groups have spread where the prompt has an even number of characters."""
    return [
        float(len(completion)) if len(prompt) % 2 == 0 else 1.0
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@pytest.mark.newest
def test_groups_without_spread_are_replaced_and_the_data_position_is_kept(
    tmp_path, monkeypatch, sft_run
):
    options = {"max_sampling_rounds": 3, "num_generations": 2, "total_episodes": 64}
    logging, data = {"num_samples": 16, "samples_every": 1}, {"eval_rows": 0}
    sources = [{"function": "tests.runtime.stages.test_grpo_runs:differs_for_some"}]
    one, two = (
        small.grpo(
            tmp_path / name,
            sft_run[0],
            grpo=options,
            logging=logging,
            rewards=sources,
            data=data,
        )
        for name in ("one", "two")
    )
    train_grpo(one)
    steps = small.metrics_by_step(tmp_path / "one")
    rounds = [steps[step]["dynamic_sampling/rounds"] for step in range(1, 5)]
    assert int(small.checkpoint(tmp_path / "one")["prompt_batches"]) == sum(rounds) > 4
    samples = small.entries(tmp_path / "one" / "samples.jsonl")
    even = [len(each["prompt"]) % 2 == 0 for each in samples if each["step"] == 1]
    assert len(even) == 16
    # Those with spread come first.
    assert even == sorted(even, reverse=True)
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, GroupStage, "step", 3)
        with pytest.raises(loop.Interrupted):
            train_grpo(two)
    train_grpo(two)
    small.assert_same_run(tmp_path / "one", tmp_path / "two")
    with pytest.raises(InputError, match="^grpo.max_sampling_rounds needs batches of prompts of"):
        train_grpo(one | {"data": {"length_buckets": 2}, "run_dir": str(tmp_path / "no")})


@pytest.mark.newest
def test_one_program_draws_batches_until_the_last_round(tmp_path, sft_run, reward_run):
    """No response ends, so that a fixed score makes all groups equal."""
    options = {"max_sampling_rounds": 2, "missing_eos_score": -1.0, "total_episodes": 48}
    config = small.grpo(tmp_path, sft_run[0], reward_run[0], grpo=options, data={"eval_rows": 0})
    config["grpo"]["response_length"] = 1
    metrics = train_grpo(config).metrics
    assert metrics["dynamic_sampling/rounds"] == 2
    assert metrics["dynamic_sampling/set_aside"] == metrics["frac_reward_zero_std"] == 1
    name = f"rewards/{reward_run[0].name}/mean"
    assert metrics[name] == metrics["dynamic_sampling/reward"]
    assert int(small.checkpoint(tmp_path, 2)["prompt_batches"]) == 4
