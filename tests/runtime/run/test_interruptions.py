"""SIGTERM in any phase, damaged checkpoints, and the best one, in complete runs."""

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
from rlhf_jax.runtime import train_ppo
from rlhf_jax.runtime.commands import terminal
from rlhf_jax.runtime.commands.main import main
from rlhf_jax.runtime.run import metrics
from rlhf_jax.runtime.run.checkpoint import Checkpoints
from rlhf_jax.runtime.run.signals import EvaluationTerminated, Signals, Terminated
from rlhf_jax.runtime.stages.offline import OfflineStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small
from tests.runtime.run import counting
from tests.runtime.run.counting import CountingStage, SamplingStage

ROOT = Path(__file__).resolve().parents[3]


def lines_of(folder):
    """(step, whether the line has an evaluation) of each line of metrics.jsonl."""
    lines = small.entries(folder / "metrics.jsonl")
    return [(line["step"], "eval/loss" in line or "eval/kl" in line) for line in lines]


# --- SIGTERM -------------------------------------------------------------------------------------

ALL = [(1, False), (2, True), (3, False), (4, True)]


@pytest.mark.parametrize(
    ("method", "call", "stopped_after", "lines", "evaluations"),
    [
        ("step", 1, 1, ALL[:1], 0),
        ("step", 4, 4, [*ALL[:3], (4, False)], 1),  # the evaluation that is due is left out
        ("evaluate", 1, 2, [(1, False), (2, False)], 0),
        ("evaluate", 2, 4, [*ALL[:3], (4, False)], 1),
        ("samples", 2, 2, ALL[:2], 1),  # after those before the first step
        ("saved", 1, 4, ALL, 2),  # during a save
    ],
)
def test_sigterm_saves_and_an_evaluation_is_repeated_when_the_run_continues(
    tmp_path, monkeypatch, counting_run, method, call, stopped_after, lines, evaluations
):
    evaluated = []
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, CountingStage, method, call, times=3)
        original = CountingStage.evaluate
        patch.setattr(
            CountingStage, "evaluate", lambda *args: [original(*args), evaluated.append(1)][0]
        )
        with pytest.raises(Terminated) as stopped:
            counting.train(tmp_path)
    assert len(evaluated) == evaluations
    assert str(stopped.value) == (
        f"Stopped after step {stopped_after} of 4; everything is saved in {tmp_path}. Run the same "
        "command again to continue."
    )
    assert small.checkpoint_names(tmp_path) == [str(stopped_after)]
    assert lines_of(tmp_path) == lines
    if method == "evaluate":  # the repeated evaluation can be interrupted again
        with monkeypatch.context() as patch:
            small.send_signal_in(patch, CountingStage, "evaluate")
            with pytest.raises(Terminated, match=f"after step {stopped_after} of 4"):
                counting.train(tmp_path)
        assert lines_of(tmp_path) == lines
    result = counting.train(tmp_path)
    small.assert_same_run(counting_run, tmp_path)
    # One more line for a repeated evaluation, and no evaluation twice.
    more = [(stopped_after, True)] if (stopped_after, False) in lines and stopped_after > 1 else []
    assert lines_of(tmp_path) == [*lines, *more, *ALL[stopped_after:]]
    assert result.metrics["eval/loss"] == small.entries(tmp_path / "metrics.jsonl")[-1]["eval/loss"]
    assert result.metrics["train/loss"] > 0


@pytest.mark.parametrize(("method", "call"), [("evaluate", 1), ("step", 4)])
def test_samples_of_a_steps_output_are_written_before_the_run_stops(
    tmp_path, monkeypatch, sampling_run, method, call
):
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, SamplingStage, method, call)
        with pytest.raises(Terminated):
            counting.train(tmp_path, SamplingStage)
    last = int(small.checkpoint_names(tmp_path)[0])
    assert small.entries(tmp_path / "samples.jsonl")[-1]["step"] == last
    counting.train(tmp_path, SamplingStage)
    small.assert_same_run(sampling_run, tmp_path)


@pytest.mark.newest
def test_the_evaluation_of_ppo_is_repeated_too(tmp_path, monkeypatch, sft_run, reward_run, ppo_run):
    config = small.ppo(tmp_path, sft_run[0], reward_run[0])
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, OnlineStage, "evaluate", 2)
        with pytest.raises(Terminated, match="after step 4 of 4"):
            train_ppo(config)
    assert lines_of(tmp_path) == [*ALL[:3], (4, False)]
    train_ppo(config)
    small.assert_same_run(ppo_run[0], tmp_path)


@pytest.mark.parametrize("method", ["init_state", "finish"])
def test_sigterm_ends_at_once_where_nothing_is_lost(tmp_path, monkeypatch, counting_run, method):
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, CountingStage, method, times=2)
        with pytest.raises(Terminated, match=r"^Stopped by SIGTERM; run the same command again to"):
            counting.train(tmp_path)
    assert small.checkpoint_names(tmp_path) == ([] if method == "init_state" else ["4"])
    assert not (tmp_path / "hf").exists()
    counting.train(tmp_path)
    small.assert_same_run(counting_run, tmp_path)


def test_the_command_exits_with_0_when_terminated_and_with_130_at_ctrl_c(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small.sft(tmp_path / "run")))
    monkeypatch.setattr(terminal, "_set_up_logging", lambda: None)
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            small.send_signal_in(patch, OfflineStage, "step", number=number)
            assert main(["sft", "--config", str(tmp_path / "config.yaml")]) == status
        assert "everything is saved in" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(
        "rlhf_jax.runtime.run_rlhf", lambda config: os.kill(os.getpid(), signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    assert main(["run"]) == 0  # between two stages
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_earlier_sigterm_ends_an_evaluation_at_its_start():
    with Signals() as signals:
        with signals.phase("step"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(EvaluationTerminated), signals.phase("evaluation"):
            raise AssertionError
        assert signals.stopping
        assert signals.terminated


def test_samples_after_a_restart_write_no_line_of_metrics(tmp_path, monkeypatch):
    """Samples are due after step 2, and a line after step 4 alone."""
    logging = {"log_every": 4, "samples_every": 2, "eval_every": 0}
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, CountingStage, "step", 2)
        with pytest.raises(Terminated):
            counting.train(tmp_path, logging=logging)
    counting.train(tmp_path, logging=logging)
    assert lines_of(tmp_path) == [(4, True)]
    steps = [line["step"] for line in small.entries(tmp_path / "samples.jsonl")]
    assert steps == [0, 0, 2, 2, 4, 4]


def test_sigterm_in_the_first_samples_leaves_a_run_that_can_begin(
    tmp_path, monkeypatch, counting_run
):
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, CountingStage, "samples")
        with pytest.raises(Terminated, match="Stopped after step 0 of 4"):
            counting.train(tmp_path)
    counting.train(tmp_path)
    small.assert_same_run(counting_run, tmp_path)


@pytest.mark.parametrize("call", [1, 2])  # an evaluation and samples are due after step 2
@pytest.mark.parametrize("stage", [CountingStage, SamplingStage])
def test_an_error_in_a_function_that_observes_loses_no_line(
    tmp_path, monkeypatch, counting_run, sampling_run, stage, call
):
    calls = []

    def failing(self, output, observe=stage.observe):
        calls.append(1)
        return observe(self, output) if len(calls) != call else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(stage, "observe", failing)
        with pytest.raises(ZeroDivisionError):
            counting.train(tmp_path, stage)
    assert small.checkpoint_names(tmp_path) == ["2"]
    counting.train(tmp_path, stage)
    small.assert_same_run(counting_run if stage is CountingStage else sampling_run, tmp_path)


def test_a_checkpoint_is_read_into_the_memory_of_the_first_state(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, CountingStage, "step", 1)
        with pytest.raises(Terminated):
            counting.train(tmp_path)
    states, restore = [], Checkpoints.restore

    def init_state(self, original=CountingStage.init_state):
        states.append(original(self))
        return states[0]

    def restoring(self, target, check):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[0]))
        return restore(self, target, check)

    monkeypatch.setattr(CountingStage, "init_state", init_state)
    monkeypatch.setattr(Checkpoints, "restore", restoring)
    counting.train(tmp_path)
    assert len(states) == 1


# --- SIGKILL -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.newest
def test_a_run_that_was_killed_twice_ends_like_one_that_was_not(
    tmp_path, sft_run, reward_run, compiled
):
    """The statistics of its scores and its KL coefficient move; the tool does it thirty times."""
    (tmp_path / "sft").symlink_to(sft_run[0])
    (tmp_path / "reward").symlink_to(reward_run[0])
    tool = str(ROOT / "tools" / "kill_and_continue.py")
    options = ["--kills", "2", "--stage", "ppo", "--steps", "6"]
    folders = ["--cache", str(compiled), "--models", str(tmp_path)]
    command = [sys.executable, tool, *options, *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("| 2 |")


def test_lines_for_an_object_store_are_written_before_the_checkpoint(tmp_path, monkeypatch):
    """They are kept in memory there, and SIGKILL would lose them."""
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    save, last_steps = Checkpoints.save, {}

    def looking(self, step, *args):
        last_steps[step] = lines_of(tmp_path)[-1][0]
        return save(self, step, *args)

    monkeypatch.setattr(Checkpoints, "save", looking)
    counting.train(tmp_path, checkpoint={"every": 2})
    assert last_steps == {2: 2, 4: 4}


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run with checkpoints of steps 2 and 3, and three lines of metrics."""
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, CountingStage, "step", 3)
        with pytest.raises(Terminated):
            counting.train(tmp_path / "run", checkpoint={"every": 1})
    return tmp_path / "run"


def test_a_run_continues_from_before_a_damaged_checkpoint(stopped, counting_run, caplog):
    assert small.checkpoint_names(stopped) == ["2", "3"]
    for file in (stopped / "checkpoints" / "3").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:50])
    with open(stopped / "samples.jsonl", "a") as file:
        file.write('{"step": 3, "response": "of the step that is lost"}\n')
    counting.train(stopped)
    small.assert_same_run(counting_run, stopped)
    (warning,) = [text for text in caplog.messages if "checkpoint" in text]
    assert warning.startswith(f"The checkpoint of step 3 in {stopped}/checkpoints cannot be used (")
    assert small.checkpoint_names(stopped) == ["2", "4", "bad-3"]


def test_a_renamed_checkpoint_is_named_and_continues_under_its_own_name(stopped, counting_run):
    folder = stopped / "checkpoints"
    (folder / "3").rename(folder / "999")
    with pytest.raises(InputError) as raised:
        counting.train(stopped)
    assert str(raised.value) == (
        f"{folder}/999 holds the checkpoint of step 3: rename it to 3, or move it away, to "
        "continue."
    )
    (folder / "999").rename(folder / "3")
    counting.train(stopped)
    small.assert_same_run(counting_run, stopped)


@pytest.mark.parametrize("damaged", [False, True])
def test_another_configuration_is_named_without_config_yaml_too(stopped, caplog, damaged):
    if damaged:
        (stopped / "config.yaml").write_text("a:\n\tb")
    else:
        (stopped / "config.yaml").unlink()
    with pytest.raises(InputError) as raised:
        counting.train(stopped, rate=0.25)
    assert str(raised.value).startswith(
        f"The run folder {stopped} was made with another configuration: rate is 0.5 there and 0.25 "
        "here; choose another --run_dir, or"
    )
    assert small.checkpoint_names(stopped) == ["2", "3"]
    assert ("config.yaml is damaged (while scanning" in caplog.text) == damaged


# --- the best ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "interrupted"), [("min", 1), ("min", 2), ("max", 2)])
def test_the_best_model_is_exported_and_known_after_a_restart(
    tmp_path, monkeypatch, counting_run, mode, interrupted
):
    """The first evaluation, of step 2, has the smallest loss; the last one has the largest."""
    best = {"best_metric": "eval/loss", "best_mode": mode, "export_best": True, "keep": 1}
    with monkeypatch.context() as patch:
        small.send_signal_in(patch, CountingStage, "evaluate", interrupted)
        with pytest.raises(Terminated):
            counting.train(tmp_path, checkpoint=best)
    result = counting.train(tmp_path, checkpoint=best)
    step = {"min": 2, "max": 4}[mode]
    assert small.checkpoint_names(tmp_path) == ["2", "4"]
    steps = small.metrics_by_step(tmp_path)
    assert [steps[each].get("best/step") for each in range(1, 5)] == [None, 2.0, None, step]
    assert steps[2]["eval/loss"] < steps[4]["eval/loss"]
    assert result.metrics["best/step"] == step
    assert result.metrics["best/value"] == steps[step]["eval/loss"]
    saved = small.checkpoint(tmp_path, step)["x"]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == np.asarray(saved).tobytes()
    metadata = json.loads((tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA").read_text())
    record = metadata["custom_metadata"]["rlhf_jax"]["record"]
    assert record.keys() == {"step", "stage", "config", "fingerprints", "arrays"}
    uninterrupted = small.metrics_by_step(counting_run)
    assert all(uninterrupted[each].items() <= steps[each].items() for each in uninterrupted)


def test_a_metric_that_is_not_evaluated_is_named(tmp_path, caplog):
    counting.train(tmp_path, checkpoint={"best_metric": "eval/scores"})
    (warning,) = [text for text in caplog.messages if "best_metric" in text]
    assert warning == (
        "checkpoint.best_metric is eval/scores, which is not evaluated: no step is the best. The "
        "evaluation has eval/accuracy, eval/loss."
    )
    assert "best/step" not in small.entries(tmp_path / "metrics.jsonl")[-1]
