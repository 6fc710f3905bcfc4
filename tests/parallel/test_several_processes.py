"""Two processes train as one does, are killed, and one or four continue from their checkpoints."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.models.huggingface import load_pretrained, load_reward_model
from tests import small
from tests.parallel.several_processes import STOP_AT, TRAIN, make_configs, stages_of

pytestmark = [pytest.mark.slow, pytest.mark.newest]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # after which processes are ended that should have come to an end


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start(processes, base, task, kind):
    """The processes of a task, each writing to a file of its own."""
    address = f"localhost:{free_port()}"
    flags = os.environ.get("XLA_FLAGS", "").split()
    environment = {
        **os.environ,
        "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag),
        "JAX_PLATFORMS": "cpu",
        # Each compiles for itself, at the same time as the others: nothing would be shared.
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    arguments = [sys.executable, "-m", "tests.parallel.several_processes", address, str(processes)]
    started = []
    for place in range(processes):
        with (base / f"{task}-{place}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*arguments, str(place), str(base), task, kind],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def statuses_of(started):
    """Their exit statuses, once the first has failed or all are done; none is left running."""
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until:
            statuses = [process.poll() for process in started]
            if None not in statuses or any(statuses):
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return statuses


def logs(base, task):
    return "\n".join(log.read_text()[-4000:] for log in sorted(base.glob(f"{task}-*.log")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs: `one/` without a stop, `alone/` and `four/` behind two processes."""
    base = tmp_path_factory.mktemp("processes")
    train_and_continue(base)
    return base


def train_and_continue(base, kind="plain"):
    """Makes all runs, those of a `kind` of configurations of several_processes.py."""
    for name, config in make_configs(base, "one", 1, kind).items():
        TRAIN[name](config)
    statuses = statuses_of(start(2, base, "stop", kind))
    assert statuses[1] == -9, logs(base, "stop")
    for name in stages_of("stop", kind):
        assert small.entries(base / "stop" / name / "metrics.jsonl")[-1]["step"] < small.STEPS
    for name in ("alone", "four"):
        shutil.copytree(base / "stop", base / name)
    four = start(4, base, "four", kind)
    for name, config in make_configs(base, "alone", 1, kind).items():
        TRAIN[name](config)
    assert statuses_of(four) == [0] * 4, logs(base, "four")


def test_the_two_were_stopped_behind_their_checkpoint(runs):
    for name in stages_of("stop", "plain"):
        saved = runs / "stop" / name / "checkpoints"
        assert {path.name for path in saved.iterdir()} == {str(STOP_AT - 1)}
        assert not (runs / "stop" / name / "hf").exists()


def assert_same_metrics(runs, folder, stage):
    """Within the rounding of sums in another order."""
    expected, actual = (small.entries(runs / x / stage / "metrics.jsonl") for x in ("one", folder))
    assert len(expected) == len(actual) == small.STEPS
    for line, other in zip(expected, actual, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            np.testing.assert_allclose(
                other[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{line['step']} {name}"
            )


def assert_same_samples(runs, folder, stage):
    """The same texts, whatever their scores are in the last digit."""
    one, other = (
        [
            {key: value for key, value in line.items() if not isinstance(value, float | dict)}
            | {"texts of tokens": line.get("tokens", {}).get("text")}
            for line in small.entries(runs / x / stage / "samples.jsonl")
        ]
        for x in ("one", folder)
    )
    assert one == other


@pytest.mark.parametrize(
    ("folder", "stage"), [(x, stage) for x in ("alone", "four") for stage in stages_of(x, "plain")]
)
def test_metrics_are_those_of_one_process(runs, stage, folder):
    assert_same_metrics(runs, folder, stage)


def test_the_same_responses_are_sampled_for_rejection(runs):
    names = ("prompt", "completion", "ended")
    files = [runs / x / "rft" / "sampled.jsonl" for x in ("one", "stop", "alone")]
    one, *others = (
        [[line[name] for name in names] for line in small.entries(file)] for file in files
    )
    assert others == [one, one]


def test_samples_are_those_of_one_process(runs):
    assert_same_samples(runs, "four", "ppo")
    lines = small.entries(runs / "four" / "ppo" / "samples.jsonl")
    assert len([line for line in lines if line["step"] > 0]) == 2 * small.STEPS / 2
    assert (runs / "four" / "ppo" / "report.html").exists()


@pytest.mark.parametrize("folder", ["alone", "four"])
def test_the_exported_models_are_complete(runs, folder):
    for stage in stages_of(folder, "plain"):
        if stage == "ppo":  # its report is checked with its samples
            continue
        load = load_reward_model if stage == "reward" else load_pretrained
        trees = [load(runs / x / stage / "hf")[1] for x in (folder, "one")]
        norms = (tree.get("model", tree)["ln_f"]["scale"] for tree in trees)
        np.testing.assert_allclose(*norms, rtol=1e-3)
        if stage == "reward":
            heads = (tree["head"]["kernel"] for tree in trees)
            np.testing.assert_allclose(*heads, rtol=1e-3, atol=1e-5)


def test_the_configuration_names_no_processes(runs):
    """So that config.yaml repeats the run wherever it is fed back."""
    text = (runs / "four" / "reward" / "config.yaml").read_text()
    assert "coordinator: null" in text


def test_the_first_process_speaks_for_all(runs):
    first, *others = [(runs / f"four-{place}.log").read_text() for place in range(4)]
    assert "the model is in" in first
    for log in others:
        assert "step" not in log
        assert "the model is in" not in log
