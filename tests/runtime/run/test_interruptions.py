"""SIGTERM at any moment, damaged checkpoints, and the best one, in whole runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained
from rlhf_jax.runtime import train_ppo, train_reward, train_sft
from rlhf_jax.runtime.commands import terminal as cli
from rlhf_jax.runtime.run import metrics
from rlhf_jax.runtime.run.checkpoint import Checkpoints
from rlhf_jax.runtime.run.signals import Signals, Terminated
from rlhf_jax.runtime.stages.ppo import PPOStage
from rlhf_jax.runtime.stages.reward import RewardStage
from rlhf_jax.runtime.stages.sft import SFTStage
from tests import small

ROOT = Path(__file__).resolve().parents[3]


def signal_in(patch, stage, method, at_call=1, number=signal.SIGTERM, times=1):
    """Makes a method of a stage receive a signal, so many times, when it is called the nth time."""
    original, calls = getattr(stage, method), []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == at_call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *args)

    patch.setattr(stage, method, interrupted)


def steps_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def steps_logged(folder):
    return [row["step"] for row in small.rows(folder / "metrics.jsonl")]


@pytest.fixture
def stages(sft_run, reward_run, ppo_run):
    """By name: the class, what trains a folder, and the folder of the uninterrupted run."""
    sft, rewarded = sft_run[0], reward_run[0]
    return {
        "sft": (SFTStage, lambda d: train_sft(small.sft(d)), sft),
        "reward": (RewardStage, lambda d: train_reward(small.reward(d, sft)), rewarded),
        "ppo": (PPOStage, lambda d: train_ppo(small.ppo(d, sft, rewarded)), ppo_run[0]),
    }


# --- SIGTERM -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "call", "stopped_after", "written", "evaluations"),
    [
        ("sft", "step", 1, 1, [1], 0),
        ("sft", "step", 4, 4, [1, 2, 3], 1),  # an evaluation is due, for which it does not wait
        ("sft", "evaluate", 1, 2, [1], 0),
        ("reward", "samples", 1, 2, [1], 1),
        ("ppo", "step", 2, 2, [1], 0),
        ("ppo", "evaluate", 2, 4, [1, 2, 3], 1),
        ("sft", "saved", 1, 4, [1, 2, 3, 4], 2),  # in the midst of a save
    ],
)
def test_sigterm_saves_and_what_it_cut_short_is_made_up_for(
    tmp_path, monkeypatch, stages, name, method, call, stopped_after, written, evaluations
):
    stage, train, uninterrupted = stages[name]
    evaluated = []
    with monkeypatch.context() as patch:
        signal_in(patch, stage, method, call, times=3)
        sent = stage.evaluate
        patch.setattr(stage, "evaluate", lambda *args: [sent(*args), evaluated.append(1)][0])
        with pytest.raises(Terminated) as stopped:
            train(tmp_path)
    assert len(evaluated) == evaluations
    assert str(stopped.value) == (
        f"Stopped after step {stopped_after} of 4; everything is saved in {tmp_path}. Run the same "
        "command again to continue."
    )
    assert steps_of(tmp_path) == [str(stopped_after)]
    assert steps_logged(tmp_path) == written
    if method == "evaluate":  # what is to be made up for can be cut short again
        with monkeypatch.context() as patch:
            signal_in(patch, stage, "evaluate")
            with pytest.raises(Terminated, match=f"after step {stopped_after} of 4"):
                train(tmp_path)
        assert steps_logged(tmp_path) == written
    train(tmp_path)
    small.assert_same_run(uninterrupted, tmp_path)


@pytest.mark.parametrize("method", ["init_state", "finish"])
def test_sigterm_ends_at_once_where_nothing_is_lost(tmp_path, monkeypatch, sft_run, method):
    with monkeypatch.context() as patch:
        signal_in(patch, SFTStage, method, times=2)
        with pytest.raises(Terminated, match=r"^Stopped by SIGTERM; run the same command again to"):
            train_sft(small.sft(tmp_path))
    assert steps_of(tmp_path) == ([] if method == "init_state" else ["4"])
    assert not (tmp_path / "hf").exists()
    train_sft(small.sft(tmp_path))
    small.assert_same_run(sft_run[0], tmp_path)


def test_the_command_exits_with_0_when_terminated_and_with_130_at_ctrl_c(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small.sft(tmp_path / "run")))
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--config", str(tmp_path / "config.yaml")])
    monkeypatch.setattr(cli, "_set_up_logging", lambda: None)
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            signal_in(patch, SFTStage, "step", number=number)
            assert cli.main("train_sft", "SFTConfig") == status
        assert "everything is saved in" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(cli, "run", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main("run_rlhf", "RLHFConfig") == 0  # between two stages
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_sigterm_that_came_before_an_evaluation_ends_it_at_once():
    with Signals() as signals:
        with signals.during("to be finished"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), signals.during("to be made up for"):
            raise AssertionError
        assert signals.stopping
        assert signals.terminated


def test_what_is_made_up_for_writes_no_line_that_was_not_due(tmp_path, monkeypatch):
    """Samples are due after step 2, and a line after step 4 alone."""
    logging = {"log_every": 4, "samples_every": 2, "eval_every": 0}
    config = small.sft(tmp_path, logging=logging)
    with monkeypatch.context() as patch:
        signal_in(patch, SFTStage, "step", 2)
        with pytest.raises(Terminated):
            train_sft(config)
    train_sft(config)
    assert steps_logged(tmp_path) == [4]
    assert [row["step"] for row in small.rows(tmp_path / "samples.jsonl")] == [2, 2, 4, 4]


@pytest.mark.parametrize("call", [1, 2])  # an evaluation and samples are due after step 2
def test_an_error_in_a_function_that_observes_loses_no_line(tmp_path, monkeypatch, stages, call):
    calls = []

    def failing(self, output):
        calls.append(1)
        if len(calls) >= call:
            raise ZeroDivisionError
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(SFTStage, "observe", failing)
        with pytest.raises(ZeroDivisionError):
            train_sft(small.sft(tmp_path))
    assert steps_of(tmp_path) == ["2"]
    train_sft(small.sft(tmp_path))
    small.assert_same_run(stages["sft"][2], tmp_path)


def test_a_checkpoint_is_read_into_the_place_of_what_was_there(tmp_path, monkeypatch):
    """The state before the first step makes room for the one that is read."""
    with monkeypatch.context() as patch:
        signal_in(patch, SFTStage, "step", 1)
        with pytest.raises(Terminated):
            train_sft(small.sft(tmp_path))
    states, restore = [], Checkpoints.restore

    def init_state(self, original=SFTStage.init_state):
        states.append(original(self))
        return states[0]

    def restoring(self, like, check):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[0]))
        return restore(self, like, check)

    monkeypatch.setattr(SFTStage, "init_state", init_state)
    monkeypatch.setattr(Checkpoints, "restore", restoring)
    train_sft(small.sft(tmp_path))
    assert len(states) == 1


# --- SIGKILL -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_killed_three_times_ends_like_one_that_was_not(
    tmp_path, sft_run, reward_run, compiled
):
    """The statistics of its scores and its KL coefficient move; the tool does it thirty times."""
    (tmp_path / "sft").symlink_to(sft_run[0])
    (tmp_path / "reward").symlink_to(reward_run[0])
    tool = str(ROOT / "tools" / "kill_and_continue.py")
    options = ["--kills", "3", "--stage", "ppo", "--steps", "8"]
    folders = ["--cache", str(compiled), "--models", str(tmp_path)]
    environment = {**os.environ, **small.cache_environment(compiled)}
    command = [sys.executable, tool, *options, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("| 3 |")


def test_lines_for_an_object_store_are_there_before_the_checkpoint(tmp_path, monkeypatch):
    """They wait in memory there, and a kill would lose those of steps that are not taken again."""
    monkeypatch.setattr(metrics, "_is_remote", lambda path: True)
    save, seen = Checkpoints.save, {}

    def looking(self, step, *args, **kwargs):
        seen[step] = steps_logged(tmp_path)[-1]
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", looking)
    train_sft(small.sft(tmp_path, checkpoint={"every": 2}))
    assert seen == {2: 2, 4: 4}


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run with checkpoints of steps 2 and 3, and three lines of metrics."""
    with monkeypatch.context() as patch:
        signal_in(patch, SFTStage, "step", 3)
        with pytest.raises(Terminated):
            train_sft(small.sft(tmp_path / "run", checkpoint={"every": 1}))
    return tmp_path / "run"


def test_a_run_goes_on_from_before_a_damaged_checkpoint(stopped, sft_run, caplog):
    assert steps_of(stopped) == ["2", "3"]
    for file in (stopped / "checkpoints" / "3").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:50])
    with open(stopped / "samples.jsonl", "a") as file:
        file.write('{"step": 3, "prompt": "of the step that is lost"}\n')
    train_sft(small.sft(stopped))
    small.assert_same_run(sft_run[0], stopped)
    (warning,) = [text for text in caplog.messages if "checkpoint" in text]
    assert warning.startswith(f"The checkpoint of step 3 in {stopped}/checkpoints cannot be used (")
    assert steps_of(stopped) == ["2", "4", "bad-3"]


def test_another_configuration_is_named_without_config_yaml_too(stopped):
    (stopped / "config.yaml").unlink()
    with pytest.raises(InputError) as raised:
        train_sft(small.sft(stopped, optimizer={"learning_rate": 0.25}))
    assert str(raised.value).startswith(
        f"The run folder {stopped} was made with another configuration: optimizer.learning_rate is "
        "0.0005 there and 0.25 here; choose another --run_dir, or"
    )
    assert steps_of(stopped) == ["2", "3"]


# --- the best ------------------------------------------------------------------------------------


def test_the_best_model_is_the_one_that_is_written(tmp_path, monkeypatch, sft_run):
    """The first evaluation is the best where the largest loss is asked for."""
    best = {"best_metric": "eval/loss", "best_mode": "max", "export_best": True, "keep": 1}
    config = small.sft(tmp_path, checkpoint=best)
    with monkeypatch.context() as patch:
        signal_in(patch, SFTStage, "evaluate", 2)
        with pytest.raises(Terminated):
            train_sft(config)
    result = train_sft(config)
    assert steps_of(tmp_path) == ["2", "4"]
    lines = small.rows(tmp_path / "metrics.jsonl")
    assert [line.get("best/step") for line in lines] == [None, 2.0, None, 2.0]
    assert result.metrics["best/value"] == lines[1]["eval/loss"] > lines[3]["eval/loss"]
    saved = small.checkpoint(tmp_path, 2)["params"]
    params = load_pretrained(tmp_path / "hf")[1]
    assert np.array_equal(params["ln_f"]["scale"], saved["ln_f"]["scale"])
    assert not np.array_equal(
        params["ln_f"]["scale"], small.checkpoint(tmp_path, 4)["params"]["ln_f"]["scale"]
    )
    metadata = json.loads((tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA").read_text())
    record = metadata["custom_metadata"]["rlhf_jax"]["record"]
    assert record.keys() == {"step", "stage", "config", "arrays", "evaluated", "owed"}
    assert record["evaluated"]["2"]["eval/loss"] == result.metrics["best/value"]
    small_lines = small.rows(sft_run[0] / "metrics.jsonl")
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in small_lines]


def test_a_metric_that_is_not_evaluated_is_named(tmp_path, caplog):
    train_sft(small.sft(tmp_path, checkpoint={"best_metric": "eval/scores"}))
    (warning,) = [text for text in caplog.messages if "best_metric" in text]
    assert warning == (
        "checkpoint.best_metric is eval/scores, which the stage sft does not evaluate: no step of "
        "it is the best. It has eval/accuracy, eval/loss, eval/perplexity."
    )
    assert "best/step" not in small.rows(tmp_path / "metrics.jsonl")[-1]
