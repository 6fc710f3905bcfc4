"""The progress line of a run, and its speed."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

import jax
from tqdm import tqdm

PHASE_SECONDS = 5.0  # of a phase that is named off a terminal


class Progress:
    """The progress of a run on standard error; a context manager.

    On a terminal it is one line that is updated: step, total, time left, and the metrics and the
    speed that fit beside a bar of ten characters. Elsewhere (a log file, CI) it is plain lines: the
    first step, the last, at most one every ten seconds between them, and phases of more than five.

    Args:
      initial_step: the step that the run starts or continues from.
      description: the first word of the line, such as "ppo".
      enabled: if False nothing is printed.
      scores: metric -> label of the mean scores that the run may have.
      file: the output; standard error if None.
    """

    LOSSES: Mapping[str, str] = {
        "train/loss": "loss",
        "train/accuracy": "accuracy",
        "eval/loss": "eval loss",
        "eval/accuracy": "eval accuracy",
    }
    OBJECTIVES: Mapping[str, str] = {
        "objective/kl": "kl",
        "objective/gold": "gold",
        "objective/entropy": "entropy",
    }
    PLAIN_SECONDS = 10.0
    BAR_WIDTH = 10  # at least

    def __init__(
        self,
        total_steps: int,
        initial_step: int,
        description: str,
        enabled: bool = True,
        scores: Mapping[str, str] | None = None,
        *,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = sys.stderr if file is None else file
        self._total, self._step, self._description = total_steps, initial_step, description
        self._labels = {**self.LOSSES, **(scores or {}), **self.OBJECTIVES}
        self._clock, self._values = clock, dict[str, float]()
        self._plain = enabled and not self._file.isatty()
        self._printed_step: int | None = None
        self._printed_time = self._first_time = 0.0
        self._phase: threading.Timer | None = None
        self._first_step = initial_step
        self._bar = tqdm(
            total=total_steps,
            initial=initial_step,
            desc=description,
            file=self._file,
            dynamic_ncols=True,
            disable=not enabled or self._plain,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}]{postfix}",
        )

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that `step` is done; metrics that are missing keep their last value."""
        shown = {*self._labels, "perf/tokens_per_sec"}
        self._values |= {k: float(v) for k, v in (metrics or {}).items() if k in shown}
        if self._plain:
            self._end_phase()
            self._update_plain(step)
        elif not self._bar.disable:
            self._describe(self._description)
            self._bar.update(step - self._bar.n)
        self._step = step

    def phase(self, name: str) -> None:
        """Shows the activity of the run until the next step, such as "evaluating"."""
        if self._plain:
            self._end_phase()
            self._phase = _delayed(self._description, name, PHASE_SECONDS, self._file)
        elif not self._bar.disable:
            self._describe(f"{self._description}, {name}")
            self._bar.refresh()

    def message(self, text: str) -> None:
        """Prints a separate line above the progress line."""
        tqdm.write(text, file=self._file)

    def close(self) -> None:
        """Prints the last state; called on leaving the `with` block."""
        self._end_phase()
        if self._plain and self._printed_step not in (None, self._step):
            self._print_plain(self._step)
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._phase.cancel()

    def _metrics(self, digits: int) -> list[str]:
        known = [(label, self._values.get(name)) for name, label in self._labels.items()]
        return [f"{label} {value:.{digits}g}" for label, value in known if value is not None][:4]

    def _speed(self) -> list[str]:
        speed = self._values.get("perf/tokens_per_sec")
        return [] if speed is None else [f"{short_number(speed)} tokens/s"]

    def _describe(self, description: str) -> None:
        """Sets the text of the bar, with the first of the fields that fit."""
        fields = [*self._metrics(digits=3), *self._speed()]
        while fields and self._width(description, fields) > self._columns():
            fields.pop()
        self._bar.desc, self._bar.postfix = description, "  ".join(fields) or None

    def _width(self, description: str, fields: Sequence[str]) -> int:
        """The width of the line with the narrowest bar; the time left may have hours."""
        elapsed = tqdm.format_interval(self._bar.format_dict["elapsed"])
        counts = f"| {self._total}/{self._total} [{elapsed}<0:00:00], {'  '.join(fields)}"
        return len(f"{description} 100%|") + self.BAR_WIDTH + len(counts)

    def _columns(self) -> float:
        try:
            return os.get_terminal_size(self._file.fileno()).columns
        except (OSError, ValueError):
            return math.inf

    def _update_plain(self, step: int) -> None:
        if self._printed_step is None:  # it compiles, unlike later ones
            self._first_time, self._first_step = self._clock(), step
        waited = self._clock() - self._printed_time
        if self._printed_step is None or step >= self._total or waited >= self.PLAIN_SECONDS:
            self._print_plain(step)

    def _print_plain(self, step: int) -> None:
        now = self._clock()
        self._printed_step, self._printed_time = step, now
        share = f"{100 * step / max(self._total, 1):.0f}%"
        fields = [f"{self._description} {step}/{self._total} ({share})"]
        if self._first_step < step < self._total:
            left = (now - self._first_time) / (step - self._first_step) * (self._total - step)
            fields.append(f"{tqdm.format_interval(left)} left")
        fields += [*self._speed(), *self._metrics(digits=4)]
        print("  ".join(fields), file=self._file, flush=True)


def show_phase(name: str, phase: str, *, file: TextIO | None = None) -> None:
    """Prints the activity of a run outside of its steps, such as "sft: writing the model"."""
    print(f"{name}: {phase}", file=sys.stderr if file is None else file, flush=True)


def show_note(text: str) -> None:
    """Prints a line to standard error, above the progress line if there is one."""
    tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def preparing(name: str, phase: str, *, shown: bool) -> Iterator[None]:
    """Shows the phase of the block, on a terminal at once and elsewhere after some seconds.

    A mistake of the user mostly ends the run before, and is then the only line of a log.
    """
    if not shown:
        yield
        return
    timer = _delayed(name, phase, 0.0 if sys.stderr.isatty() else PHASE_SECONDS, sys.stderr)
    try:
        yield
    finally:
        timer.cancel()


def _delayed(name: str, phase: str, seconds: float, file: TextIO) -> threading.Timer:
    """A timer that shows the phase after some seconds, unless it is cancelled before."""
    timer = threading.Timer(seconds, show_phase, (name, phase), {"file": file})
    timer.daemon = True
    timer.start()
    return timer


class Throughput:
    """Speed of training since the last log, without compilation, evaluations and checkpoints.

    The first step of a process compiles: the clock starts at its end, and its tokens do not count.
    The FLOPs are those of `Stage`.
    """

    def __init__(
        self,
        flops_per_token: float = 0.0,
        flops_per_step: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_per_token, self._flops_per_step = flops_per_token, flops_per_step
        self._clock = clock
        self._start: float | None = None
        self._steps = self._tokens = 0

    def add(self, tokens: int) -> None:
        """Counts one finished step with this many real tokens, on all hosts together."""
        if self._start is None:
            self._start = self._clock()
            return
        self._steps += 1
        self._tokens += int(tokens)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time of the block (an evaluation, a checkpoint) out of the count."""
        before = self._clock()
        try:
            yield
        finally:
            if self._start is not None:
                self._start += self._clock() - before

    def metrics(self) -> dict[str, float]:
        """`perf/tokens_per_sec`, `perf/step_time` (seconds) and, on devices of known peak FLOP/s,
        `perf/mfu` since the last call; {} if only the first step was done.
        """
        if self._start is None or self._steps == 0:
            return {}
        now = self._clock()
        seconds = max(now - self._start, 1e-9)
        rate, step_time = self._tokens / seconds, seconds / self._steps
        metrics = {"perf/tokens_per_sec": rate, "perf/step_time": step_time}
        per_token = self._flops_per_token + self._flops_per_step / max(rate * step_time, 1.0)
        if (mfu := utilization(per_token, rate)) is not None:
            metrics["perf/mfu"] = mfu
        self._start, self._steps, self._tokens = now, 0, 0
        return metrics


def short_number(value: float) -> str:
    """A number with three digits: 0.0123, 1.23, 12.3k, 4.57M.

    >>> [short_number(x) for x in (0.01234, 1.234, 999.96, 12345, 4.5678e6, -1500, 0, math.nan)]
    ['0.0123', '1.23', '1k', '12.3k', '4.57M', '-1.5k', '0', 'nan']
    """
    if not math.isfinite(value):
        return str(value)
    value = float(f"{value:.3g}")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


# Dense bfloat16 FLOP/s of one device, by prefix of JAX's `device_kind`; the vendors' figures.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def utilization(
    flops_per_token: float, tokens_per_second: float, devices: list[jax.Device] | None = None
) -> float | None:
    """flops_per_token * tokens_per_second over the peak of all devices; None on unknown devices.

    FLOPs are those of the products with parameters, 2 per parameter and token forwards and 4 more
    backwards; attention and recomputation are left out (Chowdhery et al. 2022, PaLM, appendix B).

    >>> utilization(6.0, 1.0, jax.devices("cpu")) is None
    True
    """
    devices = jax.devices() if devices is None else devices
    peak = peak_flops(devices[0])
    if peak is None:
        return None
    return flops_per_token * tokens_per_second / (peak * len(devices))


def peak_flops(device: jax.Device) -> float | None:
    """The published bfloat16 FLOP/s of a device; None of an unknown kind."""
    kind = device.device_kind
    return next((flops for name, flops in PEAK_FLOPS.items() if kind.startswith(name)), None)
