"""The last lines of a training command."""

import json

from rlhf_jax.runtime.commands.main import print_result
from rlhf_jax.runtime.config import trainer_named
from rlhf_jax.runtime.run.stage import StageResult


def printed(capsys, name, folder, metrics):
    print_result(trainer_named(name), StageResult(str(folder), metrics))
    return capsys.readouterr().out


def test_a_reward_model_ends_with_its_held_out_accuracy(tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text('{"table": []}')
    metrics = {"train/accuracy": 0.9, "eval/loss": 0.25, "eval/accuracy": 0.87654}
    line = "reward: eval/accuracy 0.8765, eval/loss 0.25\n"
    assert printed(capsys, "reward", tmp_path, metrics) == line


def test_fine_tuning_ends_with_its_held_out_loss(tmp_path, capsys):
    metrics = {
        "eval/loss": 0.25,
        "eval/accuracy": 0.5,
        "eval/tokens": 8.0,
        "eval/perplexity": 1.284,
    }
    line = "sft: eval/loss 0.25, eval/perplexity 1.284, eval/accuracy 0.5\n"
    assert printed(capsys, "sft", tmp_path, metrics) == line


def test_ppo_ends_with_the_scores_before_and_after(tmp_path, capsys):
    table = [{"metric": "score", "before": -1.5, "after": 0.25}]
    (tmp_path / "evaluation.json").write_text(json.dumps({"table": table}))
    lines = printed(capsys, "ppo", tmp_path, {"eval/scores": 0.25}).splitlines()
    assert lines[0].split() == ["metric", "before", "after", "change"]
    assert lines[2].split() == ["score", "-1.5", "0.25", "+1.75"]


def test_a_run_without_held_out_examples_prints_nothing(tmp_path, capsys):
    assert printed(capsys, "sft", tmp_path, {"train/loss": 1.0, "train/accuracy": 0.5}) == ""
