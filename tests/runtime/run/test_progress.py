"""What a run shows: progress on a terminal and off it, and its speed."""

import contextlib
import io
import types

import jax
import pytest

from rlhf_jax.runtime.run.progress import Progress, Throughput


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
    with Progress(100, 0, "ppo", file=out, clock=clock) as progress:
        for step in range(1, 101):
            progress.update(
                step, {"perf/tokens_per_sec": 12345.0, "objective/kl": step / 10, "x": 1}
            )
            clock.now += 1.0
    lines = out.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, *range(11, 100, 10), 100]
    assert lines[0] == "ppo 1/100 (1%)  12.3k tokens/s  kl 0.1"
    assert lines[1] == "ppo 11/100 (11%)  01:29 left  12.3k tokens/s  kl 1.1"
    assert lines[-1] == "ppo 100/100 (100%)  12.3k tokens/s  kl 10"


def test_progress_prints_the_last_step_of_a_run_that_stops_early():
    out = io.StringIO()
    with Progress(100, 40, "sft", file=out, clock=Clock()) as progress:
        for step in (41, 42, 43):
            progress.update(step)
    assert [line[:10] for line in out.getvalue().splitlines()] == ["sft 41/100", "sft 43/100"]


def test_progress_on_a_terminal_renews_one_line():
    out = Terminal()
    with Progress(10, 2, "ppo", file=out) as progress:
        progress.update(3, {"objective/scores": 1.25, "perf/tokens_per_sec": 980.0})
        progress.update(10)  # a step without metrics keeps those shown
    last = out.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("ppo 100%|")
    assert "| 10/10 [" in last
    assert last.rstrip().endswith("980 tokens/s  score 1.25")
    assert out.getvalue().count("\n") == 1


@pytest.mark.parametrize("out", [Terminal(), io.StringIO()])
def test_progress_can_be_silent(out):
    with Progress(10, 0, "ppo", enabled=False, file=out) as progress:
        progress.update(10, {"objective/kl": 1.0})
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
