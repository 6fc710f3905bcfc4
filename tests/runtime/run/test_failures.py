"""What goes wrong while a run is under way: NaN, a full disk, a reward function in Python."""

import errno
import json
import os
import shutil
import subprocess

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime import train_ppo, train_sft
from rlhf_jax.runtime.evaluation import policies
from rlhf_jax.runtime.run import checkpoint as checkpoints
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages import sft as sft_stage
from tests import small


def message(function, *arguments, error=InputError):
    """The sentence that a call fails with, one line."""
    with pytest.raises(error) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def is_finite(tree):
    import jax

    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# --- NaN -----------------------------------------------------------------------------------------


def test_a_nan_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    hot = {"learning_rate": 1e30, "max_grad_norm": None}
    config = small.sft(tmp_path, optimizer=hot, checkpoint={"every": 1}, logging={"eval_every": 0})
    assert message(train_sft, config, error=loop.DivergedError) == (
        "train/loss is nan at step 2 of the stage sft; training stopped and kept the checkpoint of "
        f"step 1, in {tmp_path}. Lower optimizer.learning_rate and start again with another "
        "--run_dir."
    )
    assert saved_steps(tmp_path) == [1]
    assert is_finite(small.checkpoint(tmp_path, 1))
    assert [row["step"] for row in small.rows(tmp_path / "metrics.jsonl")] == [1]
    assert not (tmp_path / "hf").exists()
    # The same call comes to the same end, from the checkpoint that it kept.
    assert "is nan at step 2" in message(train_sft, config, error=loop.DivergedError)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    """The loss and the gradient of the step were finite: what it made of the parameters was not."""
    hot = {"learning_rate": 1e39, "max_grad_norm": None}
    config = small.sft(tmp_path, optimizer=hot, checkpoint={"every": 1})
    told = message(train_sft, config, error=loop.DivergedError)
    assert told.startswith(
        "a parameter is not finite at step 1 of the stage sft; training stopped and kept no "
        "checkpoint, as none was due,"
    )
    assert saved_steps(tmp_path) == []


# --- reward functions ----------------------------------------------------------------------------


def failing_at(call, fail):
    """A reward function whose nth call, from 1, does something else."""
    calls = []

    def my_reward(prompts, completions, **columns):
        calls.append(1)
        scores = small.short_response(prompts, completions)
        return fail(scores) if len(calls) == call else scores

    return my_reward


def test_an_error_in_the_last_evaluation_loses_no_step(tmp_path, sft_run):
    def divide(scores):
        return [score / 0 for score in scores]

    # Four steps, and after the second both policies: what fails is the evaluation after the last.
    with pytest.raises(ZeroDivisionError):
        train_ppo(small.ppo(tmp_path, sft_run[0]), failing_at(7, divide))
    assert saved_steps(tmp_path) == [4]
    assert not (tmp_path / "hf").exists()
    # How it is judged may be another way now.
    judged = {"batch_size": 8, "num_samples": 1}
    train_ppo(small.ppo(tmp_path, sft_run[0], evaluation=judged), small.short_response)
    assert [row["step"] for row in small.rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["samples"]) == 1
    assert (tmp_path / "hf").exists()


def without_evaluation(folder, sft_run):
    return small.ppo(folder, sft_run[0], data={"eval_rows": 0}, logging={"eval_every": 0})


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda scores: [float("nan"), *scores[1:]], "my_reward gave the score nan for the compl"),
        (lambda scores: [*scores[1:], float("inf")], "my_reward gave the score inf for the compl"),
        (
            lambda scores: scores[1:],
            "my_reward gave 7 scores for 8 completions; it has to give one",
        ),
        (
            lambda scores: None,
            "my_reward gave None; it has to give a list of numbers, one for each",
        ),
        (
            lambda scores: [*scores[1:], "good"],
            "my_reward gave 'good' at index 7; it has to give a number for each completion.",
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
    assert is_finite(small.checkpoint(tmp_path, 2))


def test_an_error_in_a_reward_function_keeps_its_traceback_and_the_run_goes_on(tmp_path, sft_run):
    def divide(scores):
        return [score / 0 for score in scores]

    with pytest.raises(ZeroDivisionError) as raised:
        train_ppo(without_evaluation(tmp_path / "parts", sft_run), failing_at(4, divide))
    assert raised.traceback[-1].path == raised.traceback[-2].path  # our file, not the library's
    assert raised.value.__notes__ == ["This was raised by my_reward, which was to score 8 texts."]
    assert saved_steps(tmp_path / "parts") == [3]
    train_ppo(without_evaluation(tmp_path / "parts", sft_run), small.short_response)
    train_ppo(without_evaluation(tmp_path / "whole", sft_run), small.short_response)
    small.assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_reward_function_that_fails_at_once_leaves_a_folder_to_start_in(tmp_path, sft_run):
    config = without_evaluation(tmp_path, sft_run)
    message(train_ppo, config, failing_at(1, lambda scores: []))
    assert saved_steps(tmp_path) == []
    result = train_ppo(config, small.short_response)
    assert result.metrics["step"] == small.STEPS


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


# --- disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_under_a_log(tmp_path, monkeypatch, sft_run, file):
    original, kept = sft_stage.SFTStage.step, tmp_path / "kept"

    def filling_the_disk(self, state, index):
        if index == 2:
            (tmp_path / file).rename(kept)
            (tmp_path / file).symlink_to("/dev/full")
        return original(self, state, index)

    config = small.sft(tmp_path, checkpoint={"every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(sft_stage.SFTStage, "step", filling_the_disk)
        assert message(train_sft, config) == (
            f"cannot write to {tmp_path}: No space left on device; free some space and run the "
            "same command again: it continues from the last checkpoint"
        )
    kept.rename(tmp_path / file)
    train_sft(config)
    small.assert_same_run(sft_run[0], tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB, and a function that gives it another size; root alone can have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield (
        folder,
        lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(folder)], check=True
        ),
    )
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_under_a_checkpoint(small_disk, sft_run):
    folder, resize = small_disk
    config = small.sft(folder / "run")
    assert message(train_sft, config) == (
        f"cannot write to {folder}/run: No space left on device; free some space and run the same "
        "command again: it continues from the last checkpoint"
    )
    resize("30m")
    train_sft(config)
    small.assert_same_run(sft_run[0], folder / "run")


def test_a_disk_that_fills_under_a_later_checkpoint_leaves_the_one_before(small_disk, sft_run):
    """The write fails in the background, and the next step tells of it."""
    folder, resize = small_disk
    resize("900k")
    config = small.sft(folder / "run", checkpoint={"every": 1, "keep": 1})
    kept = folder / "kept"
    write = checkpoints.Checkpoints.save

    def filling_the_disk(self, step, *arguments, **keywords):
        if step == 2:
            self.wait()
            kept.write_bytes(bytes(shutil.disk_usage(folder).free - 100_000))
        return write(self, step, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", filling_the_disk)
        assert message(train_sft, config) == (
            f"cannot write to {folder}/run: No space left on device; free some space and run the "
            "same command again: it continues from the last checkpoint"
        )
    assert "1" in {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    resize("30m")
    train_sft(config)
    small.assert_same_run(sft_run[0], folder / "run")
    assert saved_steps(folder / "run") == [4]


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_says_orbax(*arguments, **keywords):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing: [os_error_code='28']")


@pytest.mark.parametrize(
    ("module", "name", "how"),
    [
        (sft_stage, "save_pretrained", no_space),
        (loop, "write_report", no_space),
        (checkpoints.ocp.CheckpointManager, "save", no_space_says_orbax),
    ],
)
def test_a_full_disk_at_the_end(tmp_path, monkeypatch, sft_run, module, name, how):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, how)
        assert message(train_sft, small.sft(tmp_path)).startswith(
            f"cannot write to {tmp_path}: No space left on device; free some space and run the same"
        )
    train_sft(small.sft(tmp_path))
    small.assert_same_run(sft_run[0], tmp_path)
    assert (tmp_path / "report.html").exists()


def test_a_full_disk_under_the_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "replace_file", no_space)
    told = message(policies.save_evaluation, str(tmp_path), {"table": []})
    assert told.startswith(f"cannot write to {tmp_path}: No space left on device")


def test_what_is_no_matter_of_disks_stays_an_error_of_its_own(tmp_path, monkeypatch):
    def broken(*arguments, **keywords):
        raise ValueError("a bug")

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", broken)
    with pytest.raises(ValueError, match="a bug"):
        train_sft(small.sft(tmp_path))
