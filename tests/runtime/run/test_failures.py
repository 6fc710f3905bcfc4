"""Failures during a run: NaN, errors of a reward function in Python."""

import math
import os
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import jax
import pytest

from rlhf_jax.errors import FunctionError
from rlhf_jax.runtime import config, train_ppo
from rlhf_jax.runtime.commands import terminal
from rlhf_jax.runtime.run import loop
from tests import small
from tests.runtime.messages import message
from tests.runtime.run import counting
from tests.runtime.run.counting import CountingStage, SamplingStage

ROOT = Path(__file__).resolve().parents[3]


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


# --- NaN -----------------------------------------------------------------------------------------


class DivergingStage(CountingStage):
    """A metric of the second step is not finite."""

    losses = ("train/loss", "loss/own", "own/score")
    metric, value = "train/loss", math.nan

    def step(self, state, index):
        state, metrics, output = super().step(state, index)
        return state, {**metrics, **({self.metric: self.value} if index == 1 else {})}, output


@pytest.mark.parametrize(
    ("metric", "value", "remedy"),
    [
        ("train/loss", math.nan, "Lower optimizer.learning_rate"),
        ("loss/own", -math.inf, "Lower optimizer.learning_rate"),
        ("train/grad_norm", math.inf, "Lower optimizer.learning_rate"),
        ("own/score", math.nan, "Mend the reward"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, metric, value, remedy
):
    monkeypatch.setattr(DivergingStage, "metric", metric)
    monkeypatch.setattr(DivergingStage, "value", value)
    options = {"checkpoint": {"every": 1}, "logging": {"eval_every": 0}}
    for _ in range(2):  # the same call comes to the same end, from the checkpoint that it kept
        with pytest.raises(loop.DivergedError) as raised:
            counting.train(tmp_path, DivergingStage, **options)
        assert str(raised.value) == (
            f"{metric} is {value} at step 2 of the stage counting; training stopped and kept the "
            f"checkpoint of step 1, in {tmp_path}. {remedy} and start again with another --run_dir."
        )
    assert saved_steps(tmp_path) == [1]
    assert [entry["step"] for entry in small.entries(tmp_path / "metrics.jsonl")] == [1]
    assert not (tmp_path / "hf").exists()


def test_a_metric_that_is_no_loss_may_be_infinite(tmp_path, monkeypatch):
    monkeypatch.setattr(DivergingStage, "metric", "train/other")
    counting.train(tmp_path, DivergingStage)
    assert small.entries(tmp_path / "metrics.jsonl")[1]["train/other"] == "NaN"


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """The loss and the gradient of the step were finite, but its update was not."""
    initial = counting.initial

    class Overflowing(CountingStage):
        def step(self, state, index):
            _, metrics, output = super().step(state, index)
            return jax.tree.map(lambda x: x / 0, initial(jax.random.key(0))), metrics, output

    said = message(
        lambda: counting.train(tmp_path, Overflowing, checkpoint={"every": 1}),
        error=loop.DivergedError,
    )
    assert said.startswith(
        "a parameter is not finite at step 1 of the stage counting; training stopped and kept no "
        "checkpoint, as none was due,"
    )
    assert saved_steps(tmp_path) == []


# --- errors of a user's functions ----------------------------------------------------------------


def fail_in(patch, stage, method, at_call):
    """Makes a method of a stage raise a ZeroDivisionError in its nth call."""
    original, calls = getattr(stage, method), []

    def failing(self, *args):
        calls.append(1)
        return original(self, *args) if len(calls) != at_call else 1 / 0

    patch.setattr(stage, method, failing)


@pytest.mark.parametrize(
    ("method", "call", "saved"),
    [
        ("step", 1, []),
        ("step", 3, [2]),
        ("step", 4, [3]),
        ("evaluate", 2, [4]),
    ],
)
@pytest.mark.parametrize("stage", [CountingStage, SamplingStage])
def test_an_error_loses_no_step(
    tmp_path, monkeypatch, counting_run, sampling_run, capsys, stage, method, call, saved
):
    with monkeypatch.context() as patch:
        fail_in(patch, stage, method, call)
        with pytest.raises(ZeroDivisionError):
            counting.train(tmp_path, stage)
    assert saved_steps(tmp_path) == saved
    said = f"is saved in {tmp_path}; the same command continues from there."
    assert (said in capsys.readouterr().err) == bool(saved)
    assert not (tmp_path / "hf").exists()
    counting.train(tmp_path, stage)
    small.assert_same_run(counting_run if stage is CountingStage else sampling_run, tmp_path)


def test_a_connection_that_fails_in_a_function_loses_no_step(tmp_path, monkeypatch):
    """Only errors of the disk leave nothing to save."""

    def failing(self, state, output, count):
        if output is None:  # before the first step
            return []
        raise RuntimeError("no answer") from ConnectionError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(SamplingStage, "samples", failing)
        with pytest.raises(RuntimeError, match="no answer"):
            counting.train(tmp_path, SamplingStage)
    assert saved_steps(tmp_path) == [2]


# --- reward functions ----------------------------------------------------------------------------


def failing_at(call, fail):
    """A reward function whose nth call, from 1, does something else."""
    calls = []

    def my_reward(prompts, completions, **columns):
        calls.append(1)
        scores = small.short_response(prompts, completions)
        return fail(scores) if len(calls) == call else scores

    return my_reward


def without_evaluation(folder, sft_run):
    return small.ppo(folder, sft_run[0], data={"eval_rows": 0}, logging={"eval_every": 0})


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda scores: [float("nan"), *scores[1:]], "my_reward gave the score nan for the compl"),
        (
            lambda scores: scores[1:],
            "my_reward gave 7 scores for 8 completions; it has to give a",
        ),
    ],
)
def test_a_wrong_score_is_named_and_costs_no_step(tmp_path, sft_run, capsys, fail, said):
    config = without_evaluation(tmp_path, sft_run)
    assert message(train_ppo, config, failing_at(3, fail)).startswith(said)
    assert (
        f"Step 2 is saved in {tmp_path}; the same command continues from there."
        in capsys.readouterr().err
    )
    assert saved_steps(tmp_path) == [2]


def test_a_function_that_ends_the_process_does_not_end_the_run_with_status_0(tmp_path, monkeypatch):
    def leaving(self, output, calls=[], original=SamplingStage.observe):  # noqa: B006
        calls.append(1)
        return original(self, output) if len(calls) == 1 else sys.exit(0)

    monkeypatch.setattr(SamplingStage, "observe", leaving)
    assert message(counting.train, tmp_path, SamplingStage) == (
        "A function or a module that the settings name called sys.exit(0), which ends the command "
        "before its work is done; let it raise an error, or return."
    )
    assert saved_steps(tmp_path) == [2]


def test_a_module_that_ends_the_process_is_an_error_of_every_command(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_set_up_logging", lambda: None)
    kind = config.GenerateConfig
    assert terminal.run_command("rlhf generate", kind, lambda settings: sys.exit(0), []) == 2
    assert capsys.readouterr().err.startswith("error: A function or a module that the settings")


PIPED = """
    import sys
    from rlhf_jax.runtime.commands import terminal
    from tests.runtime.run import counting

    class Waiting(counting.CountingStage):
        def step(self, state, index):
            if index == 1:
                sys.stdin.read()
            return super().step(state, index)

    sys.exit(terminal.run(lambda: counting.train(sys.argv[1], Waiting), trains=True))
"""


def test_a_run_whose_output_is_closed_is_saved_and_has_a_status_of_its_own(tmp_path, counting_run):
    command = [sys.executable, "-c", textwrap.dedent(PIPED), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    while b"compiling" not in process.stderr.readline():  # the last line before the first step
        assert process.poll() is None
    process.stderr.close()
    process.stdin.close()  # it waits for this in its second step
    assert process.wait() == 141
    assert len(saved_steps(tmp_path)) == 1
    assert not (tmp_path / "hf").exists()
    counting.train(tmp_path)
    small.assert_same_run(counting_run, tmp_path)


@pytest.mark.newest
def test_an_error_in_a_reward_function_is_one_sentence_and_the_run_goes_on(tmp_path, sft_run):
    def divide(scores):
        return [score / 0 for score in scores]

    with pytest.raises(FunctionError) as raised:
        train_ppo(without_evaluation(tmp_path / "parts", sft_run), failing_at(4, divide))
    cause = raised.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    frames = traceback.extract_tb(cause.__traceback__)
    assert {frame.filename for frame in frames} == {__file__}  # our lines, not the library's
    assert str(raised.value) == (
        f"my_reward ({os.path.relpath(__file__)}, line {frames[-1].lineno}) raised "
        f"ZeroDivisionError: {cause}, after 3 steps; step 3 is saved, and the "
        "same command continues from there."
    )
    assert saved_steps(tmp_path / "parts") == [3]
    train_ppo(without_evaluation(tmp_path / "parts", sft_run), small.short_response)
    train_ppo(without_evaluation(tmp_path / "full", sft_run), small.short_response)
    small.assert_same_run(tmp_path / "full", tmp_path / "parts")


@pytest.mark.newest
def test_a_reward_function_is_given_texts_and_the_other_columns(tmp_path, sft_run):
    file = tmp_path / "prompts.jsonl"
    lines = [f'{{"prompt": "Film {i}.", "answer": {i}, "kind": "k"}}\n' for i in range(8)]
    file.write_text("".join(lines))
    seen = []

    def reward_fn(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [float(answer) for answer in columns["answer"]]

    config = without_evaluation(tmp_path / "run", sft_run)
    config["data"] = {"path": str(file), "eval_rows": 0, "max_prompt_length": 16}
    result = train_ppo(config, reward_fn)
    assert len(seen) == small.STEPS
    for prompts, completions, columns in seen:
        assert [f"Film {answer}." for answer in columns["answer"]] == prompts
        assert columns["kind"] == ["k"] * 8
        assert set(columns) == {"answer", "kind"}
        assert all(isinstance(text, str) and "<|" not in text for text in completions)
    assert result.metrics["objective/scores"] == pytest.approx(3.5)
    assert "eval/scores" not in result.metrics
