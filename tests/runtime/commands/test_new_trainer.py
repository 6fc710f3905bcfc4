"""A further trainer in one file and one line: command, run, report, ahead-of-time program."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_jax import runtime, training
from rlhf_jax.runtime.commands import main
from rlhf_jax.runtime.stages import shared
from tests import small
from tests.versions import newest

FILE = Path(__file__).parents[3] / "docs" / "examples" / "reinforce.py"


@pytest.fixture
def reinforce(monkeypatch):
    """The trainer of docs/examples/reinforce.py, with its line in `TRAINERS`."""
    spec = importlib.util.spec_from_file_location("reinforce", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reinforce", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(training, "TRAINERS", (*training.TRAINERS, module.TRAINER))
    return module


def test_it_is_a_command_with_help(reinforce, capsys):
    assert main.main(["--help"]) == 0
    assert "  reinforce    REINFORCE with a moving baseline\n" in capsys.readouterr().out
    assert main.main(["reinforce", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: rlhf reinforce ")
    assert "  --reinforce.baseline_decay 0.9 " in text
    assert "  --evaluation.batch_size 128 " in text


def test_its_random_keys_are_its_own(reinforce):
    names = [trainer.name for trainer in training.TRAINERS]
    keys = {str(shared.stage_keys(0, name)) for name in names}
    assert len(keys) == len(names) == len(training.TRAINERS)


@pytest.mark.parametrize("reward", ["model", *newest("function")])
def test_it_trains_resumes_and_reports(
    tmp_path, monkeypatch, reinforce, sft_run, reward_run, reward
):
    config = small.ppo(tmp_path, sft_run[0], reward_run[0] if reward == "model" else None)
    settings = config.pop("ppo")
    kept = ("total_episodes", "batch_size", "response_length")
    config["reinforce"] = {name: settings[name] for name in kept}
    function = None if reward == "model" else small.short_response
    result = runtime.train_reinforce(config, function)
    lines = small.entries(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"objective/baseline", "loss/policy_avg", "objective/kl"} <= set(result.metrics)
    assert "eval/win_rate_scores" in result.metrics
    assert "REINFORCE" in (tmp_path / "report.html").read_text()
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["reinforce"]["baseline_decay"] == 0.9
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.newest
def test_it_compiles_ahead(tmp_path, reinforce, capsys):
    flags = ["--topology", "local", "--stage", "reinforce", "--model.n_layer", "1"]
    sizes = ["--reinforce.batch_size", "8", "--evaluation.batch_size", "8"]
    assert main.main(["compile-for", *flags, *sizes]) == 0
    assert capsys.readouterr().out.startswith("reinforce (")
