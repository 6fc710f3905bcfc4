"""All three stages in one run, from nothing to a trained policy and its report."""

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import yaml

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained, load_reward_model
from rlhf_jax.runtime import config, run_evaluate, run_generate, run_rlhf
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.offline import OfflineStage
from tests import small

STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all stages, as (folder, result)."""
    folder = tmp_path_factory.mktemp("rlhf")
    gold = {"gold_fn": "rlhf_jax.data.builtin:gold_scores"}
    return folder, run_rlhf(small.rlhf(folder, evaluation=gold))


def test_every_stage_leaves_its_folder_and_the_run_its_report(finished):
    folder, result = finished
    for stage in STAGES:
        names = {path.name for path in (folder / stage).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "hf", "report.html"} <= names
        assert [each["step"] for each in small.entries(folder / stage / "metrics.jsonl")] == [
            1,
            2,
            3,
            4,
        ]
        assert result.metrics[f"{stage}/step"] == small.STEPS
    assert {"config.yaml", "report.html", "evaluation.json"} <= {p.name for p in folder.iterdir()}
    assert result.run_dir == str(folder)
    assert {"sft/train/loss", "reward/eval/accuracy", "ppo/objective/kl"} <= result.metrics.keys()
    report = (folder / "report.html").read_text()
    for words in ("supervised", "reward", "PPO", "win rate"):
        assert words.lower() in report.lower()


def test_the_stages_start_from_one_another(finished):
    folder, _ = finished
    policy, _ = load_pretrained(folder / "ppo" / "hf")
    scorer, _ = load_reward_model(folder / "reward" / "hf")
    first, _ = load_pretrained(folder / "sft" / "hf")
    assert policy.config.vocab_size == first.config.vocab_size
    assert policy.config.n_positions == scorer.config.n_positions == 64
    ppo = yaml.safe_load((folder / "ppo" / "config.yaml").read_text())
    assert ppo["model"]["path"] == f"{folder}/sft/hf"
    assert ppo["model"]["reward_path"] == f"{folder}/reward/hf"
    tokenizers = {(folder / stage / "hf" / "tokenizer.json").read_bytes() for stage in STAGES}
    assert len(tokenizers) == 1


def test_the_evaluation_compares_before_and_after(finished):
    folder, _ = finished
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation == json.loads((folder / "ppo" / "evaluation.json").read_text())
    names = {row["metric"] for row in evaluation["table"]}
    assert {"gold score", "score", "win rate by the gold score"} <= names
    assert evaluation["metrics"]["num_prompts"] == 8
    assert {"prompt", "before", "after"} <= evaluation["samples"][0].keys()


def test_the_same_call_again_does_nothing_and_is_quick(finished, capsys):
    folder, result = finished
    kept = [*folder.rglob("*.safetensors"), *folder.rglob("*.jsonl")]
    before = {file: file.stat().st_mtime_ns for file in kept}
    start = time.monotonic()
    assert run_rlhf(folder / "config.yaml").metrics == result.metrics
    assert time.monotonic() - start < 10
    assert {file: file.stat().st_mtime_ns for file in kept} == before
    said = capsys.readouterr()
    assert said.err.count("is complete; nothing is left to do.") == 3
    assert "warning" not in said.err.lower()
    assert "win rate" in said.out


def test_a_refused_call_leaves_the_folder_as_it_was(finished, monkeypatch):
    """The first stage refuses other data, behind the checks of the outer folder."""
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["logging"]["log_every"] = 2
    fingerprints = shared.data_fingerprints

    def others(settings):
        return {
            name: {**parts, "the number of training examples": 0}
            for name, parts in fingerprints(settings).items()
        }

    monkeypatch.setattr(shared, "data_fingerprints", others)
    with pytest.raises(InputError, match=r"changed since the run in \S+/sft began: the number of"):
        run_rlhf(config)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.newest
def test_the_configuration_fed_back_and_an_interrupt_change_nothing(
    tmp_path, monkeypatch, finished
):
    folder, _ = finished
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"run_dir": str(tmp_path)}
    original = OfflineStage.step

    def interrupted(self, state, index):
        if self.name == "reward" and index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, state, index)

    with monkeypatch.context() as patch:
        patch.setattr(OfflineStage, "step", interrupted)
        with pytest.raises(loop.Interrupted, match=r"Stopped after step 2 of 4; .*/reward\. Run"):
            run_rlhf(config)
    run_rlhf(config)
    for stage in STAGES:
        small.assert_same_run(folder / stage, tmp_path / stage)
    ours, theirs = ((run / "evaluation.json").read_text() for run in (tmp_path, folder))
    assert ours == theirs


@pytest.mark.newest
def test_a_reward_model_that_is_trained_already_is_used(tmp_path, finished):
    folder, _ = finished
    settings = small.rlhf(tmp_path, model={"path": f"{folder}/sft/hf"})
    settings["model"]["reward_path"] = f"{folder}/reward/hf"
    run_rlhf(settings | {"tokenizer": {"path": f"{folder}/sft/hf"}})
    assert not (tmp_path / "reward").exists()
    assert (tmp_path / "ppo" / "hf" / "model.safetensors").exists()
    assert (tmp_path / "report.html").exists()


def test_the_commands_of_the_readme_fit_the_models_of_the_demo(
    finished, tmp_path, monkeypatch, capsys
):
    """The models of this run have as many positions as those of the demo."""
    root = Path(__file__).resolve().parents[1]
    demo = yaml.safe_load((root / "configs" / "demo" / "rlhf.yaml").read_text())
    assert demo["model"]["n_positions"] == small.MODEL["n_positions"]
    commands = {
        "generate": lambda flags: run_generate(config.parse(config.GenerateConfig, flags)),
        "evaluate": lambda flags: run_evaluate(config.parse(config.EvaluateConfig, flags)),
    }
    monkeypatch.chdir(tmp_path)
    text = (root / "README.md").read_text().replace("\\\n", " ")
    examples = re.findall(r"^\S*rlhf (\w+) (.*runs/demo/.*)$", text, re.M)
    assert {name for name, _ in examples} == set(commands)
    for name, flags in examples:
        commands[name](shlex.split(flags.replace("runs/demo", str(finished[0]))))
    printed = capsys.readouterr().out
    assert '"response"' in printed
    assert "accuracy" in printed
