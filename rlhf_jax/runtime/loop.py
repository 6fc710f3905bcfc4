"""The loop that every stage runs in: step, log, evaluate, save, and stop losing nothing."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.checkpoint import Checkpoints
from rlhf_jax.runtime.config import claim_run_dir, to_dict
from rlhf_jax.runtime.metrics import MetricsWriter, NoWriter, disk_errors, read_lines
from rlhf_jax.runtime.progress import Progress, Throughput
from rlhf_jax.runtime.report import write_report
from rlhf_jax.runtime.utilization import utilization

Metrics = dict[str, float]


class DivergedError(FloatingPointError):
    """A loss or a gradient is not a number; the message names the step and what is kept."""

    told_to_all = True  # all hosts see the same numbers


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the state was saved; the message says how to continue."""

    told_to_all = True  # all hosts have agreed to stop


class StageResult(NamedTuple):
    """What a command returns.

    Attributes:
      run_dir: the folder that it wrote.
      metrics: the last value of each metric.
    """

    run_dir: str
    metrics: Metrics


class Stage(Protocol):
    """One stage of training: what differs between SFT, reward model and PPO."""

    name: str
    mesh: Mesh
    total_steps: int
    flops_per_token: float  # of products with parameters, for each real token of a step
    flops_per_step: float  # and of what a step reads beside these tokens

    def init_state(self) -> Any:
        """The state before the first step."""
        ...

    def step(self, state: Any, index: int) -> tuple[Any, Mapping[str, jax.Array], Any]:
        """Step number `index` from 0: (state, metrics on the device, output for `observe`)."""
        ...

    def observe(self, output: Any) -> Metrics:
        """Metrics that need the text of a step's output."""
        ...

    def evaluate(self, state: Any) -> Metrics:
        """Metrics on held-out rows."""
        ...

    def samples(self, state: Any, output: Any, count: int) -> list[dict[str, Any]]:
        """Rows for `samples.jsonl`."""
        ...

    def saved(self, state: Any) -> Any:
        """The part of a state that a checkpoint holds."""
        ...

    def resumed(self, state: Any, saved: Any) -> Any:
        """A state with that part put back."""
        ...

    def finish(self, state: Any) -> None:
        """Writes `hf/` and what else belongs into the run folder at the end."""
        ...


def run(make_stage: Callable[[], Stage], config: Any) -> StageResult:
    """Trains a stage to its end, from its newest checkpoint where there is one.

    Args:
      make_stage: reads the data and the models; not called when the run is complete.
      config: that of the stage.

    Raises:
      InputError: the folder cannot be written, or holds a run with another configuration.
      DivergedError: a loss or gradient is NaN or infinite.
      Interrupted: Ctrl-C or SIGTERM, after the state was saved.
    """
    with hosts.ending_together():
        hosts.from_first(claim_run_dir, config)
        if not hosts.from_first(is_finished, config.run_dir):
            stage = make_stage()
            with jax.set_mesh(stage.mesh):
                _train(stage, config)
        elif hosts.is_first():
            print(f"{config.run_dir} is complete; nothing is left to do.", file=sys.stderr)
        return StageResult(config.run_dir, hosts.from_first(last_metrics, config.run_dir))


def _train(stage: Stage, config: Any) -> None:
    """The run of a stage from where it stopped, or from its beginning, to its end."""
    folder = epath.Path(config.run_dir)
    with disk_errors(folder):
        checkpoints = Checkpoints(config.run_dir, config.checkpoint)
    try:
        start = checkpoints.latest_step() or 0
        state = stage.init_state()
        if start:
            state = stage.resumed(state, checkpoints.restore(stage.saved(state)))
        shown = config.logging.progress and hosts.is_first()
        with (
            _writer(stage.name, config, start) as writer,
            Progress(stage.total_steps, start, stage.name, shown) as progress,
            _interrupts() as interrupted,
        ):
            loop = _Loop(stage, config, checkpoints, writer, progress)
            state = loop.run(state, start, interrupted)
        with disk_errors(folder):
            stage.finish(state)
            report = hosts.from_first(write_report, folder)
        if hosts.is_first():
            print(
                f"{stage.name}: the model is in {folder / 'hf'}, the report in {report}",
                file=sys.stderr,
            )
    finally:
        with disk_errors(folder):
            checkpoints.close()


def _writer(name: str, config: Any, start: int) -> MetricsWriter | NoWriter:
    """What writes the run's lines: on the first host alone."""
    if not hosts.is_first():
        return NoWriter()
    return MetricsWriter(
        config.run_dir, config.logging, to_dict(config), name=name, initial_step=start
    )


def last_metrics(run_dir: str) -> Metrics:
    """The newest value of each metric in `metrics.jsonl`."""
    values: Metrics = {}
    for row in read_lines(epath.Path(run_dir) / "metrics.jsonl"):
        values |= {key: float(value) for key, value in row.items() if key != "time"}
    return values


class _Loop:
    """One run of the loop: what stays the same from step to step."""

    def __init__(self, stage, config, checkpoints, writer, progress) -> None:
        self.stage, self.config, self.checkpoints = stage, config, checkpoints
        self.writer, self.progress, self.throughput = writer, progress, Throughput()
        self.saved_at, self.logged_step = time.monotonic(), 0
        self.agree, self.late = hosts.Agreement(2), False

    def run(self, state: Any, start: int, interrupted: threading.Event) -> Any:
        pending = None
        for index in range(start, self.stage.total_steps):
            try:
                state, metrics, output = self.stage.step(state, index)
            except Exception:
                self._rescue(state, index, pending)
                raise
            # The step before is logged while this one runs on the device.
            if pending is not None:
                self._log(*pending)
            pending = (index + 1, metrics, output)
            # Read once, for what is said below has to be so; and the same on all hosts.
            stopping, self.late = self.agree(interrupted.is_set(), self._is_late())
            if stopping or self._is_due(index + 1) or self._is_save_due(index + 1):
                try:
                    self._pause(state, *pending, stopping=stopping)
                except DivergedError:
                    raise  # there is nothing to go on from
                except Exception as error:
                    # On a full disk the lines of this step are lost: it has to be taken again.
                    if not isinstance(error.__cause__, OSError):
                        self._rescue(state, index + 1, pending)
                    raise
                pending = None
            if stopping:
                raise Interrupted(
                    f"Stopped after step {index + 1} of {self.stage.total_steps}; everything is "
                    f"saved in {self.config.run_dir}. Run the same command again to continue."
                )
        return state

    def _is_due(self, step: int) -> bool:
        return (
            step == self.stage.total_steps
            or _every(self.config.logging.eval_every, step)
            or _every(self.config.logging.samples_every, step)
        )

    def _is_late(self) -> bool:
        """Whether the clock of this host says that it is time to save."""
        minutes, waited = self.config.checkpoint.minutes, time.monotonic() - self.saved_at
        return minutes > 0 and waited >= 60.0 * minutes

    def _is_save_due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return self.late or step == self.stage.total_steps or _every(every, step)

    def _pause(self, state, step, metrics, output, *, stopping: bool) -> None:
        """Evaluates, writes samples and saves, where it is time for each."""
        logging, last = self.config.logging, step == self.stage.total_steps
        self._check(step, hosts.to_host(metrics))
        evaluation: Metrics = {}
        with self.throughput.pause():
            if stopping:  # who stops us may not wait for an evaluation
                self._save(step, state)
            if last or _every(logging.eval_every, step):
                evaluation = self.stage.evaluate(state)
        self._log(step, metrics, output, evaluation)
        with self.throughput.pause():
            if last or _every(logging.samples_every, step):
                rows = self.stage.samples(state, output, logging.num_samples)
                self.writer.samples(step, rows)
            # Last, so that what a checkpoint continues from has all its lines.
            if self._is_save_due(step):
                self._save(step, state)

    def _save(self, step: int, state: Any) -> None:
        """Saves a checkpoint, but none that training could not continue from."""
        saved = self.stage.saved(state)
        if not _is_finite(saved):
            self._diverged(step, "a parameter is not finite")
        with disk_errors(self.config.run_dir):
            self.checkpoints.save(step, saved)
        self.saved_at = time.monotonic()

    def _rescue(self, state: Any, step: int, pending: tuple | None) -> None:
        """Saves the state of `step` after an error that followed, say in a reward function."""
        if step == 0 or any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return  # nothing was done yet, or the failed step has used the state up
        if not hosts.all_come(f"rescue/{self.stage.name}/{step}", 10.0):
            return  # the others, who hold parts of the state, are elsewhere
        with contextlib.suppress(Exception):  # the first error is the one to be told
            if pending is not None and pending[0] != self.logged_step:
                self._log(*pending)
        with contextlib.suppress(Exception):
            self._save(step, state)
            where = f"is saved in {self.config.run_dir}"
            if hosts.is_first():
                self.progress.message(
                    f"Step {step} {where}; the same command continues from there."
                )

    def _log(self, step, metrics, output, evaluation: Metrics | None = None) -> None:
        values = {key: float(value) for key, value in hosts.to_host(dict(metrics)).items()}
        self._check(step, values)
        tokens = values.pop("perf/tokens", 0.0)
        self.throughput.add(int(tokens))
        wanted = evaluation or step == self.stage.total_steps
        if wanted or step % self.config.logging.log_every == 0:
            values |= self.stage.observe(output) | (evaluation or {}) | self._speed()
            self.writer.write(step, values)
            self.logged_step = step
        self.progress.update(step, values)

    def _speed(self) -> Metrics:
        """Tokens per second, seconds per step and, on devices whose peak is known, the MFU."""
        speed = self.throughput.metrics()
        if speed:
            rate, seconds = speed["perf/tokens_per_sec"], speed["perf/step_time"]
            beside = self.stage.flops_per_step / max(rate * seconds, 1.0)
            mfu = utilization(self.stage.flops_per_token + beside, rate)
            speed |= {} if mfu is None else {"perf/mfu": mfu}
        return speed

    def _check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises where a loss or the gradient is not finite; nothing was saved since it was."""
        for name in ("train/loss", "loss/policy_avg", "loss/value_avg", "train/grad_norm"):
            if name in metrics and not math.isfinite(metrics[name]):
                self._diverged(step, f"{name} is {float(metrics[name])}")

    def _diverged(self, step: int, what: str) -> NoReturn:
        kept = self.checkpoints.latest_step()
        where = f"the checkpoint of step {kept}" if kept else "no checkpoint, as none was due"
        raise DivergedError(
            f"{what} at step {step} of the stage {self.stage.name}; training stopped "
            f"and kept {where}, in {self.config.run_dir}. Lower optimizer.learning_rate and start "
            "again with another --run_dir."
        )


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    """bool[]: no NaN and no infinity in any array of a tree."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def is_finished(run_dir: str) -> bool:
    """Whether the last things that a stage writes are there."""
    folder = epath.Path(run_dir)
    return (folder / "hf" / "config.json").exists() and (folder / "report.html").exists()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second Ctrl-C interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals reach the main thread alone
        return

    def stop(signum, frame):
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Past Python's buffers, which the interrupted code may be in the midst of writing to.
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
