"""Progress of a run on a terminal and off it, and its speed."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios
import time
import types

import jax
import pytest

from rlhf_jax.runtime.run import progress
from rlhf_jax.runtime.run.progress import Progress, Throughput, preparing


class Clock:
    """Seconds that pass when a test adds them."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_off_a_terminal_is_a_line_every_ten_seconds():
    clock, out = Clock(), io.StringIO()
    with Progress(100, 0, "ppo", file=out, clock=clock) as shown:
        for step in range(1, 101):
            shown.update(step, {"perf/tokens_per_sec": 12345.0, "objective/kl": step / 10, "x": 1})
            clock.now += 1.0
    lines = out.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, *range(11, 100, 10), 100]
    assert lines[0] == "ppo 1/100 (1%)  12.3k tokens/s  kl 0.1"
    assert lines[1] == "ppo 11/100 (11%)  01:29 left  12.3k tokens/s  kl 1.1"
    assert lines[-1] == "ppo 100/100 (100%)  12.3k tokens/s  kl 10"


def test_progress_prints_the_last_step_of_a_run_that_stops_early():
    out = io.StringIO()
    with Progress(100, 40, "sft", file=out, clock=Clock()) as shown:
        for step in (41, 42, 43):
            shown.update(step)
    assert [line[:10] for line in out.getvalue().splitlines()] == ["sft 41/100", "sft 43/100"]


def test_progress_on_a_terminal_renews_one_line():
    out = Terminal()
    with Progress(10, 2, "ppo", scores={"objective/scores": "score"}, file=out) as shown:
        shown.update(3, {"objective/scores": 1.25, "perf/tokens_per_sec": 980.0})
        shown.update(10)  # a step without metrics keeps those shown
    last = out.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("ppo 100%|")
    assert "| 10/10 [" in last
    assert last.rstrip().endswith(", score 1.25  980 tokens/s")
    assert out.getvalue().count("\n") == 1


def test_loading_is_shown_where_it_takes_long(capsys, monkeypatch):
    with preparing("sft", "loading", shown=True):
        pass
    monkeypatch.setattr(progress, "PHASE_SECONDS", 0.0)
    with preparing("sft", "loading", shown=False):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""
    with preparing("sft", "loading", shown=True):
        time.sleep(0.2)
    assert capsys.readouterr().err == "sft: loading\n"


PPO = {
    "objective/scores": -12.345678,
    "objective/gold": 0.123456,
    "objective/kl": 123.456,
    "objective/entropy": 45.6789,
    "perf/tokens_per_sec": 123456.0,
}
REWARD = {"train/loss": 0.612345, "train/accuracy": 0.8, "eval/loss": 0.6, "eval/accuracy": 0.81}


@pytest.mark.parametrize(
    ("columns", "name", "metrics", "fields"),
    [
        (80, "ppo", PPO, "score -12.3  kl 123  gold 0.123"),
        (100, "ppo", PPO, "score -12.3  kl 123  gold 0.123  entropy 45.7"),
        (120, "ppo", PPO, "score -12.3  kl 123  gold 0.123  entropy 45.7  123k tokens/s"),
        (80, "reward", REWARD, "loss 0.612  accuracy 0.8"),
        (50, "reward", REWARD, ""),
    ],
)
def test_fields_fit_the_columns_beside_a_bar_of_ten(columns, name, metrics, fields):
    """On a terminal of the system, whose size tqdm and the fields read."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(writer, "w") as out:
        with Progress(1000, 0, name, scores={"objective/scores": "score"}, file=out) as shown:
            shown.update(1000, metrics)
        text = b""
        while not text.endswith(b"\n"):
            text += os.read(reader, 65536)
        last = text.decode().rstrip().split("\r")[-1]
    os.close(reader)
    assert last.partition("]")[2] == (f", {fields}" if fields else "")
    assert len(last) <= columns
    assert len(last.split("|")[1]) >= 10


def test_a_phase_is_shown_until_the_next_step(monkeypatch):
    out = Terminal()
    with Progress(10, 0, "sft", file=out) as shown:
        shown.phase("compiling")
        assert out.getvalue().split("\r")[-1].startswith("sft, compiling   0%|")
        shown.update(10)
    assert out.getvalue().rstrip().split("\r")[-1].startswith("sft 100%|")
    lines = io.StringIO()
    with Progress(10, 0, "sft", file=lines) as shown:
        shown.phase("compiling")  # shorter than PHASE_SECONDS
        shown.update(1)
        monkeypatch.setattr(progress, "PHASE_SECONDS", 0.0)
        shown.phase("evaluating")
        time.sleep(0.2)
    assert lines.getvalue() == "sft 1/10 (10%)\nsft: evaluating\n"


@pytest.mark.parametrize("out", [Terminal(), io.StringIO()])
def test_progress_can_be_silent(out):
    with Progress(10, 0, "ppo", enabled=False, file=out) as shown:
        shown.phase("compiling")
        shown.update(10, {"objective/kl": 1.0})
    assert out.getvalue() == ""


def test_throughput_leaves_out_compilation_and_pauses():
    clock = Clock()
    throughput = Throughput(clock=clock)
    clock.now += 60  # the first step compiles
    throughput.add(1000)
    assert throughput.metrics() == {}
    for tokens in (100, 300):
        clock.now += 2
        throughput.add(tokens)
    with contextlib.suppress(KeyError), throughput.pause():
        clock.now += 50
        raise KeyError
    assert throughput.metrics() == {"perf/tokens_per_sec": 100.0, "perf/step_time": 2.0}
    clock.now += 4
    throughput.add(100)
    assert throughput.metrics() == {"perf/tokens_per_sec": 25.0, "perf/step_time": 4.0}
    assert throughput.metrics() == {}


def test_throughput_has_the_utilization_of_devices_of_known_peak(monkeypatch):
    clock = Clock()
    devices = [types.SimpleNamespace(device_kind="NVIDIA H100")] * 2
    monkeypatch.setattr(jax, "devices", lambda: devices)
    throughput = Throughput(6e9, 2e11, clock=clock)
    throughput.add(0)
    clock.now += 2
    throughput.add(200)
    # 100 tokens a second of 6 GFLOP each, and one half of 200 GFLOP a second beside them.
    assert throughput.metrics()["perf/mfu"] == pytest.approx((100 * 6e9 + 1e11) / (2 * 989e12))
