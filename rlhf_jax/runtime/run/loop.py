"""The loop that every stage runs in: step, log, evaluate, save, and stop losing nothing."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
from etils import epath
from jax.sharding import Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.config import check_same, claim_run_dir, to_dict
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.run.checkpoint import Checkpoints
from rlhf_jax.runtime.run.heap import trim_heap
from rlhf_jax.runtime.run.metrics import MetricsWriter, NoWriter, disk_errors, plain, read_lines
from rlhf_jax.runtime.run.progress import Progress, Throughput
from rlhf_jax.runtime.run.records import Record
from rlhf_jax.runtime.run.signals import CutShort, Interrupted, Signals, Terminated
from rlhf_jax.runtime.run.utilization import utilization

Metrics = dict[str, float]

logger = logging.getLogger("rlhf_jax.runtime.run.loop")


class DivergedError(FloatingPointError):
    """A loss or a gradient is not a number; the message names the step and what is kept."""

    raised_on_all_hosts = True  # all hosts see the same numbers


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
        """Step number `index` from 0: (state, metrics on the device, output for `observe`).

        The output is None where neither `observe` nor `samples` need any.
        """
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
      InputError: the folder cannot be written, holds a run with another configuration, or has
        checkpoints of which none can be used.
      DivergedError: a loss or gradient is NaN or infinite.
      Interrupted: Ctrl-C or, as `Terminated`, SIGTERM, after the state was saved.
    """
    with Signals() as signals, hosts.failing_together():
        hosts.from_first(claim_run_dir, config)
        _check_shared(config.run_dir)
        if not hosts.from_first(is_finished, config.run_dir):
            stage = make_stage()
            with jax.set_mesh(stage.mesh):
                _train(stage, config, signals)
        elif hosts.is_first():
            print(f"{config.run_dir} is complete; nothing is left to do.", file=sys.stderr)
        return StageResult(config.run_dir, hosts.from_first(last_metrics, config.run_dir))


def _check_shared(run_dir: str) -> None:
    """Raises an InputError if this host does not see what the first one wrote."""
    if not (epath.Path(run_dir) / "config.yaml").exists():
        raise InputError(
            f"Process {jax.process_index()} does not see the run folder {run_dir} of process 0; "
            "give --run_dir a folder that all hosts share, or an address such as gs://."
        )


def _train(stage: Stage, config: Any, signals: Signals) -> None:
    """The run of a stage from where it stopped, or from its beginning, to its end."""
    folder = epath.Path(config.run_dir)
    with disk_errors(folder):
        checkpoints = Checkpoints(config.run_dir, config.checkpoint)
    try:
        state, start, owed = _begin(stage, checkpoints, config)
        shown = config.logging.progress and hosts.is_first()
        with (
            signals.during("to be finished"),
            _writer(stage.name, config, start - bool(owed)) as writer,
            Progress(stage.total_steps, start, stage.name, shown) as progress,
        ):
            state = _Loop(stage, config, checkpoints, writer, progress, signals).run(
                state, start, owed
            )
        with disk_errors(folder), signals.during("nothing to lose"):
            stage.finish(_chosen(stage, state, checkpoints, config))
            report = hosts.from_first(write_report, folder)
        if hosts.is_first():
            print(
                f"{stage.name}: the model is in {folder / 'hf'}, the report in {report}",
                file=sys.stderr,
            )
    finally:
        with disk_errors(folder):
            checkpoints.close()


def _writer(name: str, config: Any, initial_step: int) -> MetricsWriter | NoWriter:
    """What writes the run's lines: on the first host alone."""
    if not hosts.is_first():
        return NoWriter()
    return MetricsWriter(
        config.run_dir, config.logging, to_dict(config), name=name, initial_step=initial_step
    )


def _begin(stage: Stage, checkpoints: Checkpoints, config: Any) -> tuple[Any, int, Record]:
    """(state, the step that it is after, what is to be made up for of that step)."""

    def check(record: Record) -> None:
        check_same(config, record["config"])

    state = stage.init_state()
    if checkpoints.latest_step() is None:
        return state, 0, {}
    restored = checkpoints.restore(_let_go(stage.saved(state)), check)
    assert restored is not None  # there are checkpoints, of which one is used or an error raised
    state = stage.resumed(state, restored.state)
    return state, restored.step, restored.record.get("owed") or {}


def _let_go(saved: Any) -> Any:
    """The form of what a checkpoint holds, whose own arrays make room for those that are read."""

    def form(leaf):
        if not leaf.size:
            return leaf
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        leaf.delete()
        return shape

    return jax.tree.map(form, saved)


def _chosen(stage: Stage, state: Any, checkpoints: Checkpoints, config: Any) -> Any:
    """The state whose model is written: the last one, or that of the best step."""
    best, name = checkpoints.best(), config.checkpoint.best_metric
    if config.checkpoint.export_best and best is None and hosts.is_first():
        print(f"{stage.name}: no step is the best by {name}; the last is taken", file=sys.stderr)
    if not config.checkpoint.export_best or best is None or best[0] == stage.total_steps:
        return state
    like = _let_go(stage.saved(state))
    restored = checkpoints.restore_best(like) or checkpoints.restore(like, lambda record: None)
    assert restored is not None  # the last step was saved
    if hosts.is_first():
        print(f"{stage.name}: step {restored.step} was the best by {name}", file=sys.stderr)
    return stage.resumed(state, restored.state)


def last_metrics(run_dir: str) -> Metrics:
    """The newest value of each metric in `metrics.jsonl`."""
    values: Metrics = {}
    for row in read_lines(epath.Path(run_dir) / "metrics.jsonl"):
        values |= {key: float(value) for key, value in row.items() if key != "time"}
    return values


class _Loop:
    """One run of the loop: what stays the same from step to step."""

    def __init__(self, stage, config, checkpoints, writer, progress, signals) -> None:
        self.stage, self.config, self.checkpoints = stage, config, checkpoints
        self.writer, self.progress, self.signals = writer, progress, signals
        self.throughput = Throughput()
        self.saved_at, self.logged_step, self.warned = time.monotonic(), 0, False
        self.agree, self.terminated, self.rescuing = hosts.Agreement(3), False, False

    def run(self, state: Any, start: int, owed: Record) -> Any:
        if owed:
            self._make_up_for(state, start, owed)
        pending: tuple[int, Any, Any] | None = None
        for index in range(start, self.stage.total_steps):
            try:
                state, metrics, output = self.stage.step(state, index)
            except Exception:
                self._rescue(state, index, pending)
                raise
            if index == start:
                trim_heap()  # what compiling it has left
            # The step before is logged while this one runs on the device.
            before, pending = pending, (index + 1, metrics, output)
            if before is not None:
                with self._rescued(state, before, pending):
                    self._log(*before)
            # Read once, for what is said below has to be so; and the same on all hosts.
            stopping, late, self.terminated = self.agree(
                self._is_stopping(), self._is_late(), self.signals.terminated
            )
            saving = late or self._is_save_due(index + 1)
            if stopping or saving or self._is_due(index + 1):
                with self._rescued(state, pending):
                    stopping = self._pause(state, *pending, stopping=stopping, saving=saving)
                pending = None
            if stopping:
                self._stop(index + 1)
        with disk_errors(self.config.run_dir):
            self.checkpoints.wait()  # what is exported next says that the run is complete
        return state

    @contextlib.contextmanager
    def _rescued(self, state: Any, *pending: tuple) -> Iterator[None]:
        """Saves the state after the last of these steps if the block fails by what others wrote."""
        try:
            yield
        except DivergedError:
            raise  # there is nothing to go on from
        except Exception as error:
            # On a full disk the lines of these steps are lost: they have to be taken again.
            if not isinstance(error.__cause__, OSError):
                self._rescue(state, pending[-1][0], *pending)
            raise

    def _is_stopping(self) -> bool:
        """Whether this process was told to stop."""
        with disk_errors(self.config.run_dir):
            self.checkpoints.check()
        return self.signals.stopping

    def _is_late(self) -> bool:
        """Whether the clock of this process says that it is time to save."""
        minutes, waited = self.config.checkpoint.minutes, time.monotonic() - self.saved_at
        return minutes > 0 and waited >= 60.0 * minutes

    def _is_save_due(self, step: int) -> bool:
        """Whether to save after this step, whatever an evaluation gives."""
        return step == self.stage.total_steps or _every(self.config.checkpoint.every, step)

    def _is_due(self, step: int) -> bool:
        return self._is_evaluation_due(step) or self._are_samples_due(step)

    def _is_evaluation_due(self, step: int) -> bool:
        return step == self.stage.total_steps or _every(self.config.logging.eval_every, step)

    def _are_samples_due(self, step: int) -> bool:
        return step == self.stage.total_steps or _every(self.config.logging.samples_every, step)

    def _pause(self, state, step, metrics, output, *, stopping: bool, saving: bool) -> bool:
        """Evaluates, writes samples and saves, where it is time for each; whether to stop now.

        Who stops us does not wait for an evaluation: the checkpoint tells that it is still owed.
        """
        self._check(step, hosts.to_host(metrics))
        try:
            if stopping and self._is_due(step):
                raise CutShort
            evaluation, rows = self._look(state, step, output)
        except CutShort:
            self._save(step, state, owed=self._owed(state, step, metrics, output))
            return True
        self._log(step, metrics, output, evaluation)
        self.writer.samples(step, rows)
        # Last, so that what a checkpoint continues from has all its lines.
        if saving or stopping or self._is_best(step, evaluation):
            with self.throughput.pause():
                self._save(step, state, evaluation)
            # Since the step began, which several processes agree on in the next one.
            return stopping or (not hosts.several() and self._is_stopping())
        return stopping

    def _look(self, state, step, output, rows: list | None = None) -> tuple[Metrics, list]:
        """The evaluation and the samples of a step, where it is time for each.

        Raises:
          CutShort: SIGTERM came.
        """
        evaluation: Metrics = {}
        if not self._is_due(step):
            return evaluation, []
        with self.throughput.pause(), self.signals.during("to be made up for"):
            if self._is_evaluation_due(step):
                evaluation = dict(self.stage.evaluate(state))
            if rows is None and self._are_samples_due(step):
                rows = self.stage.samples(state, output, self.config.logging.num_samples)
        return self._with_best(step, evaluation), rows or []

    def _owed(self, state, step, metrics, output) -> Record:
        """What the lines of a step hold that is lost with the process; the state gives the rest."""
        values = self._values(step, metrics)
        values.pop("perf/tokens", None)
        rows = None
        if output is not None and self._are_samples_due(step):
            rows = self.stage.samples(state, output, self.config.logging.num_samples)
        return plain({"values": values | self._observed(output), "samples": rows})

    def _observed(self, output) -> Metrics:
        """The metrics of a step's texts; in a rescue none if a function fails to give them."""
        try:
            return self.stage.observe(output)
        except Exception:
            if not self.rescuing:
                raise
            return {}

    def _make_up_for(self, state, step, owed: Record) -> None:
        """Writes the lines of a step whose evaluation was cut short."""
        try:
            evaluation, rows = self._look(state, step, None, owed["samples"])
        except CutShort:
            self._stop(step)  # the checkpoint is there, and tells it still
        self.checkpoints.evaluated(step, evaluation)
        if self._is_line_due(step, evaluation):
            self.writer.write(step, owed["values"] | evaluation)
        self.logged_step = step
        self.writer.samples(step, rows)

    def _stop(self, step: int) -> NoReturn:
        with disk_errors(self.config.run_dir):
            self.checkpoints.wait()
        terminated = self.terminated or (not hosts.several() and self.signals.terminated)
        kind = Terminated if terminated else Interrupted
        stopped = kind(
            f"Stopped after step {step} of {self.stage.total_steps}; everything is saved in "
            f"{self.config.run_dir}. Run the same command again to continue."
        )
        stopped.raised_on_all_hosts = True  # all hosts have agreed to stop
        raise stopped

    def _is_best(self, step: int, evaluation: Metrics) -> bool:
        return evaluation.get("best/step") == step

    def _with_best(self, step: int, evaluation: Metrics) -> Metrics:
        """The evaluation, and which step is the best by now."""
        name = self.config.checkpoint.best_metric
        if name is None or not evaluation:
            return evaluation
        if name not in evaluation:
            self._warn_of_metric(name, evaluation)
        best = self.checkpoints.best(step, evaluation)
        if best is None:
            return evaluation
        return evaluation | {"best/step": float(best[0]), "best/value": best[1]}

    def _warn_of_metric(self, name: str, evaluation: Metrics) -> None:
        if not self.warned:
            logger.warning(
                "checkpoint.best_metric is %s, which the stage %s does not evaluate: no step of it "
                "is the best. It has %s.",
                name,
                self.stage.name,
                ", ".join(sorted(evaluation)),
            )
        self.warned = True

    def _save(self, step, state, evaluation: Metrics | None = None, owed=None) -> None:
        """Saves a checkpoint, but none that training could not continue from."""
        more = {"config": to_dict(self.config), "stage": self.stage.name, "owed": owed}
        self.writer.flush()
        with disk_errors(self.config.run_dir):
            saved = self.checkpoints.save(
                step, self.stage.saved(state), metrics=evaluation, more=more
            )
        if not saved:
            self._diverged(step, "a parameter is not finite")
        self.saved_at = time.monotonic()

    def _rescue(self, state: Any, step: int, *pending: tuple | None) -> None:
        """Saves the state of `step` after an error that followed, say in a reward function.

        And the lines of `pending` steps, which were not written yet.
        """
        if step == 0 or any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return  # nothing was done yet, or the failed step has used the state up
        if not hosts.reach_barrier(f"rescue/{self.stage.name}/{step}", 10.0):
            return  # the others, who hold parts of the state, are elsewhere
        self.rescuing = True
        with contextlib.suppress(Exception):  # the first error is the one to be told
            owed = None
            for each in pending:
                if each is None or each[0] <= self.logged_step:
                    continue
                if each[0] == step and self._is_due(step):
                    owed = self._owed(state, *each)
                else:
                    self._log(*each)
            self._save(step, state, owed=owed)
            self.checkpoints.wait()
            where = f"is saved in {self.config.run_dir}"
            if hosts.is_first():
                self.progress.message(
                    f"Step {step} {where}; the same command continues from there."
                )

    def _log(self, step, metrics, output, evaluation: Metrics | None = None) -> None:
        values = self._values(step, metrics)
        tokens = values.pop("perf/tokens", 0.0)
        self.throughput.add(int(tokens))
        if self._is_line_due(step, evaluation):
            values |= self._observed(output) | (evaluation or {}) | self._speed()
            self.writer.write(step, values)
        self.logged_step = step
        self.progress.update(step, values)

    def _is_line_due(self, step: int, evaluation: Metrics | None) -> bool:
        last = step == self.stage.total_steps
        return bool(evaluation) or last or _every(self.config.logging.log_every, step)

    def _values(self, step, metrics) -> Metrics:
        values = {key: float(value) for key, value in hosts.to_host(dict(metrics)).items()}
        self._check(step, values)
        return values

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


def is_finished(run_dir: str) -> bool:
    """Whether the last things that a stage writes are there."""
    folder = epath.Path(run_dir)
    return (folder / "hf" / "config.json").exists() and (folder / "report.html").exists()
