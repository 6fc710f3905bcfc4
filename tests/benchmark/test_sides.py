import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from scripts.benchmark import command, isolation, settings, sides
from scripts.benchmark.machine import Machine
from scripts.benchmark.settings import BenchmarkError
from scripts.benchmark.workloads import make_arrays, make_request, read_request


def test_sides_take_turns_and_reset_their_peaks_after_the_warm_up(peer, tiny, tmp_path):
    commands = [peer("one"), peer("two")]
    results = sides.take_turns(commands, tiny, rounds=2, warmup=1)
    first = ["one step", "two step"]
    second = ["one reset", "one step", "one step", "two reset", "two step", "two step"]
    third = ["one step", "one step", "two step", "two step"]
    log = (tmp_path / "log").read_text().splitlines()
    assert log == [*first, *second, *third, "one stop", "two stop"]
    assert list(results) == ["one", "two"]
    assert results["two"]["seconds"] == [2.0, 2.0]
    assert results["two"]["warmup_seconds"] == [2.0]
    assert results["two"]["peak_bytes"] == 2**30


def test_on_a_gpu_one_side_ends_before_the_next_begins(peer, tiny, tmp_path):
    commands = [peer("one"), peer("two")]
    results = sides.take_turns(commands, tiny, rounds=1, warmup=1, alternate=False)
    turns = ["step", "reset", "step", "stop"]
    log = (tmp_path / "log").read_text().splitlines()
    assert log == [f"{name} {word}" for name in ("one", "two") for word in turns]
    assert {name: side["seconds"] for name, side in results.items()} == {"one": [2.0], "two": [2.0]}


def test_a_workload_in_bfloat16_has_each_side_in_it_once(tiny, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    commands = [
        sides.our_command("float32"),
        sides.trl_command("python", "float32", "gpu"),
        sides.our_command("bfloat16"),
    ]
    assert sides.commands_for(commands, tiny) == commands
    half = sides.commands_for(commands, dataclasses.replace(tiny, fixed_dtype="bfloat16"))
    assert [(each.name, each.dtype) for each in half] == [("ours", "bfloat16"), ("trl", "bfloat16")]
    alone = dataclasses.replace(tiny, has_peer=False)
    assert sides.commands_for(commands, alone) == [commands[0], commands[2]]
    ours, trl = (each.environment for each in half)
    assert (ours["CUDA_VISIBLE_DEVICES"], trl["CUDA_VISIBLE_DEVICES"]) == ("2,3", "2")
    assert ours["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    # GPUs are hidden from PyTorch if JAX runs on the CPU.
    assert sides.trl_command("python", "float32").environment["CUDA_VISIBLE_DEVICES"] == ""


def test_an_isolated_function_runs_in_a_subprocess_and_raises_its_errors(monkeypatch):
    assert isolation.isolated(os.getpid) == os.getpid()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert isolation.isolated(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        isolation.isolated(divmod, 1, 0)


def test_a_side_that_ends_early_is_an_error_with_its_last_output(peer, tiny):
    with pytest.raises(BenchmarkError, match=r"trl could not run sft_tiny: it ended with: Run"):
        sides.take_turns([peer(dtype="bfloat16")], tiny, rounds=1, warmup=1)


def test_a_request_is_read_as_it_was_written(tiny):
    request = json.loads(json.dumps(make_request(tiny, "bfloat16")))
    assert read_request(request) == (tiny, "bfloat16")
    assert request["pad_token_id"] == 14
    arrays = make_arrays(tiny)
    assert arrays["tokens"].shape == (2, 5)
    assert arrays["tokens"].max() < 14
    assert arrays["loss_mask"].tolist() == [[False, False, False, True, True]] * 2


def test_a_workload_that_fails_does_not_lose_the_ones_before(
    peer, tiny, machine, tmp_path, monkeypatch
):
    """A peer in place of this library; it fails in the second workload."""
    workloads = (tiny, dataclasses.replace(tiny, name="sft_other"))
    monkeypatch.setattr(settings, "WORKLOADS", workloads)
    monkeypatch.setattr(settings, "NAMES", tuple(workload.name for workload in workloads))
    monkeypatch.setattr(command, "measure_machine", lambda: machine)
    monkeypatch.setattr(command, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(command, "_commands", lambda config: [peer()])

    def take_turns(commands, workload, **turns):
        if workload is not tiny:
            raise BenchmarkError("ended")
        return sides.take_turns(commands, workload, **turns)

    monkeypatch.setattr(command, "take_turns", take_turns)
    file = tmp_path / "numbers.json"
    with pytest.raises(BenchmarkError):
        command.run_benchmark({"rounds": 2, "check": False, "json": str(file)})
    result = json.loads(file.read_text())
    (workload,) = result["workloads"]
    assert workload["sides"]["trl"]["seconds"] == [2.0, 2.0]
    assert result["versions"]["trl"] == "0.0"


@pytest.fixture(scope="module")
def machine():
    return Machine({"float32": 1e9, "bfloat16": 2e9}, 1e9, 2e9)


@pytest.mark.newest
def test_the_command_measures_this_library_beside_a_peer(
    peer, tiny, machine, tmp_path, monkeypatch, capsys
):
    """Both processes, the table, and the file."""
    monkeypatch.setattr(settings, "WORKLOADS", (tiny,))
    monkeypatch.setattr(settings, "NAMES", (tiny.name,))
    monkeypatch.setattr(command, "measure_machine", lambda: machine)
    both = [sides.our_command("float32"), peer()]
    monkeypatch.setattr(command, "_commands", lambda config: both)
    file = tmp_path / "numbers.json"
    command.run_benchmark({"rounds": 2, "check": False, "json": str(file)})
    result = json.loads(file.read_text())
    (workload,) = result["workloads"]
    ours = workload["sides"]["ours"]
    assert len(ours["seconds"]) == 2
    assert ours["losses"][0] == pytest.approx(2.77, abs=0.1)  # log 16, before any training
    assert ours["ready"]["compile_seconds"] > 0
    assert ours["ready"]["temporary_bytes"] > 0
    assert ours["peak_bytes"] > 2**20
    assert ours["compilations_after_first_step"] == 0
    summary = workload["summary"]["ours"]
    ratios = [2.0 / seconds for seconds in ours["seconds"]]
    assert summary["times_faster"] == pytest.approx(np.median(ratios))
    assert summary["floor_seconds"] > 0
    assert result["versions"]["trl"] == "0.0"
    assert result["versions"]["TRL's numpy"] == "0.1"
    out = capsys.readouterr().out
    assert out.startswith("| workload | TRL, s | ours, s |")
    assert "\n| sft_tiny |  2.000 |" in out
