"""The script of several online trainers side by side: what it makes of runs that are finished."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime import config
from tests.runtime.messages import message

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "shared": {
        "rewards": [{"function": "rlhf_jax.data.tasks.arithmetic:reward"}],
        "settings": {"total_episodes": 64, "response_length": 4},
        "optimizer": {"learning_rate": 0.5},
        "evaluation": {"num_responses": 2},
    },
    "methods": {
        "GRPO": {"trainer": "grpo", "grpo": {"batch_size": 4, "num_generations": 2}},
        "PPO": {"trainer": "ppo", "ppo": {"batch_size": 8}, "optimizer": {"learning_rate": 0.1}},
    },
    "seeds": [0, 1],
    "target": 0.75,
}


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / "lessons")
        from scripts import policy_gradients

        yield policy_gradients


def finished(folder, before, after):
    """A run with a point after each of eight iterations; the one of the second is there twice."""
    folder.mkdir(parents=True)
    rows = [{"step": step, "eval/scores": step / 8} for step in (1, 2, 2, *range(3, 9))]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 8, "train/loss": 0.0}])
    (folder / "metrics.jsonl").write_text(text)
    metrics = {"metrics": {"before_pass@1": before, "pass@1": after}}
    (folder / "evaluation.json").write_text(json.dumps(metrics))


def test_finished_runs_are_a_table_and_curves_over_equal_numbers_of_responses(
    script, tmp_path, capsys
):
    settings = config.resolve(script.Config, {**CONFIG, "run_dir": str(tmp_path)})
    (tmp_path / "sft" / "hf").mkdir(parents=True)
    (tmp_path / "problems.jsonl").touch()
    for method, ends in {"GRPO": (0.7, 0.9), "PPO": (0.5, 0.7)}.items():
        for seed, after in enumerate(ends):
            finished(tmp_path / f"{method.lower()}-{seed}", 0.25, after)
    script.main(settings)
    printed = capsys.readouterr().out
    assert "| GRPO | 0.250 | 0.800 | 0.700 | 2 |\n| PPO | 0.250 | 0.600 | 0.500 | 2 |" in printed
    assert "GRPO: the target, a mean pass@1 of 0.75, is reached" in printed
    assert "PPO: the target, a mean pass@1 of 0.75, is not reached" in printed
    assert ET.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    runs = {name: script.run_config(settings, name, 1) for name in settings.methods}
    curves = {name: script.result_of(run).curve for name, run in runs.items()}
    assert curves["GRPO"] == curves["PPO"] == [(8 * n, n / 8) for n in range(1, 9)]
    assert [run.optimizer.learning_rate for run in runs.values()] == [0.5, 0.1]
    assert {run.settings.total_episodes for run in runs.values()} == {64}


def test_methods_without_an_online_trainer_are_one_sentence(script):
    wrong = {**CONFIG, "methods": {"SFT": {"trainer": "sft"}}}
    assert message(config.resolve, script.Config, wrong).startswith("methods.SFT needs a trainer")
    unknown = {**CONFIG, "selected": ["DPO"]}
    expected = "selected has 'DPO', but the methods are GRPO, PPO."
    assert message(config.resolve, script.Config, unknown) == expected
    with pytest.raises(InputError, match="methods and seeds must not be empty"):
        script.Config()
