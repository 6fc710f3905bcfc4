"""A run that was stopped and started again equals one that was not, bit for bit."""

import collections
import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained, save_pretrained
from rlhf_jax.runtime import train_ppo, train_reward, train_sft
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.run.folder import is_finished
from rlhf_jax.runtime.run.settings import LoggingSettings
from rlhf_jax.runtime.stages.offline import OfflineStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small
from tests.runtime.run import counting

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def stages(sft_run, reward_run, ppo_run, counting_run):
    """By name: the class, what trains a folder, and the folder of the uninterrupted run."""
    sft, rewarded = sft_run[0], reward_run[0]
    return {
        "sft": (OfflineStage, lambda folder: train_sft(small.sft(folder)), sft),
        "reward": (
            OfflineStage,
            lambda folder: train_reward(small.reward(folder, sft)),
            rewarded,
        ),
        "ppo": (
            OnlineStage,
            lambda folder: train_ppo(small.ppo(folder, sft, rewarded)),
            ppo_run[0],
        ),
        "counting": (counting.CountingStage, counting.train, counting_run),
    }


@pytest.mark.parametrize(
    ("name", "method", "call", "stopped_after"),
    [
        ("sft", "step", 3, 3),
        ("reward", "step", 2, 2),  # an evaluation and samples are due after this step
        ("ppo", "evaluate", 1, 3),  # the run stops after the next step
        ("counting", "step", 4, 4),  # all that is left is the export
    ],
)
def test_ctrl_c_saves_and_the_same_call_continues_bit_for_bit(
    tmp_path, monkeypatch, capfd, stages, name, method, call, stopped_after
):
    stage, train, uninterrupted = stages[name]
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, stage, method, call)
        with pytest.raises(loop.Interrupted) as stopped:
            train(tmp_path)
    assert str(stopped.value) == (
        f"Stopped after step {stopped_after} of 4; everything is saved in {tmp_path}. Run the same "
        "command again to continue."
    )
    assert "Stopping after this step; once more to stop at once." in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(stopped_after)]
    assert not (tmp_path / "hf").exists()
    train(tmp_path)
    small.assert_same_run(uninterrupted, tmp_path)


OPTIONS = {
    "truncate_token": "e",
    "truncate_after": 2,
    "missing_eos_score": -1.0,
    "scale_reward": "running",
    "exact_kl": True,
    "surrogate": "kl_penalty",
    "penalty_target": 1e-6,
    "max_approxkl": 0.5,
    "entropy_coef": 0.01,
    "ptx_coef": 0.5,
    "ptx_batch_size": 4,
}
TEXTS = {"builtin_rows": 16, "eval_rows": 0, "max_length": 48}


@pytest.mark.newest
def test_running_scores_the_penalty_and_texts_continue_bit_for_bit(
    tmp_path, monkeypatch, sft_run, reward_run
):
    def train(name):
        config = small.ppo(tmp_path / name, sft_run[0], reward_run[0], ppo=OPTIONS, ptx=TEXTS)
        train_ppo(config)

    train("full")
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, OnlineStage, "step", 2)
        with pytest.raises(loop.Interrupted, match="after step 2 of 4"):
            train("parts")
    train("parts")
    small.assert_same_run(tmp_path / "full", tmp_path / "parts")
    saved = small.checkpoint(tmp_path / "parts")
    # All that an exact continuation needs: batches and keys follow from the seed and the step.
    assert saved.keys() == {
        "step",
        "params",
        "opt_state",
        "kl_coef",
        "penalty_coef",
        "score_stats",
        "frozen",
    }
    assert saved["params"].keys() == {"model", "value_head"}
    assert saved["frozen"].keys() == {"fingerprint"}
    assert float(saved["score_stats"]["num_scores"]) == 32
    assert float(saved["penalty_coef"]) > 1.0
    lines = small.metrics_by_step(tmp_path / "parts").values()
    losses = [line["loss/ptx_avg"] for line in lines]
    assert len(set(losses)) == 4
    scales = [line["objective/score_scale"] for line in lines]
    assert len(set(scales)) == 4


def test_a_run_of_an_earlier_version_continues(tmp_path, monkeypatch, stages):
    """Its configuration lacks new keys, and its checkpoint new fields."""
    earlier = ("step", "params", "opt_state", "kl_coef", "frozen")
    _, train, uninterrupted = stages["ppo"]
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, OnlineStage, "step", 2)
        state = collections.namedtuple("PPOState", earlier)
        saved = OnlineStage.saved
        patch.setattr(OnlineStage, "saved", lambda *args: state(**saved(*args)))
        with pytest.raises(loop.Interrupted, match="after step 2 of 4"):
            train(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for name in (*OPTIONS, "penalty_coef"):
        del config["ppo"][name]
    del config["ptx"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    train(tmp_path)
    small.assert_same_run(uninterrupted, tmp_path)


def test_the_handlers_of_signals_are_restored(tmp_path, monkeypatch):
    # Where tests are started in the background, SIGINT may be ignored.
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    small.interrupt_in(monkeypatch, counting.CountingStage, "step", 1)
    with pytest.raises(loop.Interrupted, match="after step 1 of 4"):
        counting.train(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.newest
def test_a_reward_function_sees_the_same_after_an_interrupt(tmp_path, sft_run):
    seen = {"full": [], "parts": []}

    def reward_fn(prompts, completions, *, calls, stop=None, **columns):
        calls.append((prompts, completions))
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return small.short_response(prompts, completions)

    def train(folder, calls, stop=None):
        # Evaluation asks the reward function as well, when it likes; here it is left out.
        config = small.ppo(tmp_path / folder, sft_run[0], data={"eval_rows": 0})
        return train_ppo(config, functools.partial(reward_fn, calls=seen[calls], stop=stop))

    train("full", "full")
    with pytest.raises(loop.Interrupted, match="after step 2 of 4"):
        train("parts", "parts", stop=2)
    train("parts", "parts")
    assert seen["parts"] == seen["full"]
    small.assert_same_run(tmp_path / "full", tmp_path / "parts")


@pytest.mark.newest
def test_another_reference_than_before_is_refused(tmp_path, monkeypatch, sft_run, reward_run):
    """The policy's folder is trained further while the run is stopped."""
    policy = tmp_path / "policy"
    shutil.copytree(sft_run[0] / "hf", policy / "hf")
    config = small.ppo(tmp_path / "run", policy, reward_run[0])
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, OnlineStage, "step", 2)
        with pytest.raises(loop.Interrupted):
            train_ppo(config)
    model, params = load_pretrained(policy / "hf")
    params["ln_f"]["bias"] = params["ln_f"]["bias"].at[0].add(1e-3)
    save_pretrained(policy / "hf", model, params)
    refused = pytest.raises(InputError, match="is not the one that the run in .* began with")
    with refused, unchanged(tmp_path / "run"):
        train_ppo(config | {"logging": {"log_every": 2}})


@contextlib.contextmanager
def unchanged(folder):
    """After the block the folder has the same files with the same bytes."""

    def contents():
        return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    before = contents()
    try:
        yield
    finally:
        assert contents() == before


def test_a_finished_run_is_extended_and_equals_a_longer_one(tmp_path, counting_run, capsys):
    counting.train(tmp_path / "long", steps=6)
    shutil.copytree(counting_run, tmp_path / "short")
    capsys.readouterr()
    counting.train(tmp_path / "short", steps=6)
    assert capsys.readouterr().err.startswith(
        "counting: continuing from step 4 of 6; steps is 6 now and was 4; from here on the linear "
        "schedule is that of the new length\n"
    )
    small.assert_same_run(tmp_path / "long", tmp_path / "short", step=6)
    counting.train(tmp_path / "short", steps=6)
    assert "is complete; nothing is left to do." in capsys.readouterr().err
    with pytest.raises(InputError) as raised, unchanged(tmp_path / "short"):
        counting.train(tmp_path / "short", steps=5)
    assert str(raised.value) == (
        f"The run in {tmp_path}/short has taken 6 steps already, but is to end at step 5; set steps"
        " higher, or choose another --run_dir."
    )


def test_a_run_without_checkpoints_has_the_length_that_it_had(tmp_path, counting_run):
    shutil.copytree(counting_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError) as raised, unchanged(tmp_path / "run"):
        counting.train(tmp_path / "run", steps=6)
    assert str(raised.value) == (
        f"The run in {tmp_path}/run cannot get another length, as it has no checkpoint to continue "
        "from; steps is 6 now and was 4; choose another --run_dir."
    )
    counting.train(tmp_path / "run")


def test_an_extension_that_was_interrupted_is_not_complete(tmp_path, monkeypatch, counting_run):
    shutil.copytree(counting_run, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(counting.CountingStage, "__init__", lambda *args: 1 / 0)  # while it loads
        with pytest.raises(ZeroDivisionError):
            counting.train(tmp_path / "run", steps=6)
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, counting.CountingStage, "step", 1)
        with pytest.raises(loop.Interrupted, match="after step 5 of 6"):
            counting.train(tmp_path / "run", steps=6)
    (tmp_path / "run" / "report.html").touch()  # by `rlhf report`
    assert not is_finished(counting.Config(run_dir=str(tmp_path / "run"), steps=6))
    counting.train(tmp_path / "run", steps=6)
    assert small.entries(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6


@pytest.mark.newest
def test_the_learning_rate_of_an_extended_run_is_that_of_the_longer_one(tmp_path):
    """With a constant schedule bit for bit."""
    epochs = {"short": 0.5, "long": 1.0}
    config = {name: small.sft(tmp_path / name, sft={"num_epochs": epochs[name]}) for name in epochs}
    for each in config.values():
        each["optimizer"] = {"schedule": "constant"}
    train_sft(config["long"])
    train_sft(config["short"])
    train_sft({**config["long"], "run_dir": str(tmp_path / "short")})
    small.assert_same_run(tmp_path / "long", tmp_path / "short")


@pytest.mark.parametrize("interrupted", [True, False])
def test_other_data_than_before_are_named(tmp_path, monkeypatch, interrupted):
    with monkeypatch.context() as patch:
        if interrupted:
            small.interrupt_in(patch, counting.CountingStage, "step", 2)
        with pytest.raises(loop.Interrupted) if interrupted else contextlib.nullcontext():
            counting.train(tmp_path)
    monkeypatch.setattr(counting, "EXAMPLES", 25)
    with pytest.raises(InputError) as raised, unchanged(tmp_path):
        counting.train(tmp_path, logging={"log_every": 2})
    assert str(raised.value) == (
        f"The data in counting changed since the run in {tmp_path} began: the number of examples "
        "was 5 then and is 25 now; put it back, or choose another --run_dir to start anew."
    )


def test_a_complete_run_whose_data_are_gone_says_that_they_were_not_compared(counting_run, capsys):
    def missing():
        raise InputError("There is no file data.jsonl.")

    config = counting.Config(run_dir=str(counting_run))
    config = dataclasses.replace(config, logging=LoggingSettings(**small.LOGGING))
    loop.run(lambda: 1 / 0, config, missing)
    assert capsys.readouterr().err == (
        f"{counting_run} is complete; nothing is left to do. Its data were not compared: There is "
        "no file data.jsonl.\n"
    )


@pytest.mark.newest
def test_sigkill_costs_the_steps_since_the_last_checkpoint(tmp_path, counting_run):
    """The process is killed in the fourth step; its lines after the checkpoint are cut."""
    program = """
        import os, signal, sys
        from tests.runtime.run import counting

        class Killed(counting.CountingStage):
            def step(self, state, index):
                if index == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().step(state, index)

        counting.train(sys.argv[1], Killed, checkpoint={"every": 2})
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Whether the line of step 3 was written before the end is a matter of chance.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/loss": 99}\n{"step": 4, "tra')
    counting.train(tmp_path, checkpoint={"every": 2})
    assert [entry["step"] for entry in small.entries(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    small.assert_same_run(counting_run, tmp_path)
