"""Runs of online DPO: one program with a reward model, rewards and judges in Python."""

import json

import numpy as np
import pytest
import yaml

from rlhf_jax.errors import InputError
from rlhf_jax.runtime import train_online_dpo
from rlhf_jax.runtime.commands import main
from rlhf_jax.runtime.evaluation.python_judge import win_rates
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small

THREE = {"num_responses": 3, "total_episodes": 48}


def test_the_command_trains_reports_and_continues_bit_for_bit(
    tmp_path, monkeypatch, capsys, sft_run, reward_run
):
    full, stopped = (
        small.online_dpo(tmp_path / name, sft_run[0], reward_run[0]) for name in ("one", "two")
    )
    programs, finish = [], OnlineStage.finish

    def counted(self, state):
        programs.append(self._step._cache_size())
        return finish(self, state)

    monkeypatch.setattr(OnlineStage, "finish", counted)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(full))
    assert main.main(["online-dpo", "--config", str(tmp_path / "run.yaml")]) == 0
    assert "win rate by the score" in capsys.readouterr().out
    assert programs == [1]
    first = small.metrics_by_step(tmp_path / "one")[1]
    # Policy and reference are the same model, up to the rounding of two programs.
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["objective/scores_margin"] > 0
    assert "Online preference optimization" in (tmp_path / "one" / "report.html").read_text()
    evaluation = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert {"win_rate_scores", "kl", "scores"} <= set(evaluation["metrics"])

    with monkeypatch.context() as patch:
        small.interrupt_in(patch, OnlineStage, "step", 2)
        with pytest.raises(loop.Interrupted):
            train_online_dpo(stopped)
    train_online_dpo(stopped)
    small.assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.newest
def test_a_function_scores_all_responses_beside_their_prompts(tmp_path, sft_run):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [-float(len(completion)) for completion in completions]

    config = small.online_dpo(
        tmp_path, sft_run[0], online_dpo=THREE, data={"eval_rows": 0}, logging={"num_samples": 24}
    )
    train_online_dpo(config, reward)
    assert len(calls) == 2
    prompts, completions, columns = calls[-1]
    assert prompts == [prompt for prompt in prompts[::3] for _ in range(3)]
    assert all(len(values) == 24 for values in columns.values())
    last = [entry for entry in small.entries(tmp_path / "samples.jsonl") if entry["step"] == 2]
    assert [(entry["prompt"], entry["response"], -entry["score"]) for entry in last] == [
        (*texts, len(texts[1])) for texts in zip(prompts, completions, strict=True)
    ]


@pytest.mark.newest
def test_a_judge_ranks_and_evaluates(tmp_path, sft_run, reward_run):
    judge = {**THREE, "judge_fn": "tests.small:shorter_wins"}
    result = train_online_dpo(small.online_dpo(tmp_path / "run", sft_run[0], online_dpo=judge))
    assert result.metrics["objective/scores"] == pytest.approx(0.5)
    assert {"eval/win_rate_judge", "eval/kl"} <= set(result.metrics)
    assert "eval/scores" not in result.metrics
    config = small.online_dpo(tmp_path / "both", sft_run[0], reward_run[0], online_dpo=judge)
    with pytest.raises(InputError, match="^online_dpo.judge_fn takes the place of rewards, but"):
        train_online_dpo(config)


def test_win_rates_are_means_over_opponents_in_both_orders():
    rates = win_rates(small.shorter_wins, ["p", "q"], [["a", "aa"], ["aa", "bb"], ["aaa", "b"]], {})
    # Of two lengths the shorter wins with (0.9 + 1 - 0) / 2 = 0.95, of equal ones with 0.5.
    expected = [[0.95, 0.5, 0.05], [(0.5 + 0.05) / 2, (0.5 + 0.05) / 2, 0.95]]
    np.testing.assert_allclose(rates, expected, atol=1e-6)
