"""The training loop of every stage: steps, logs, evaluations, checkpoints, and its safe end."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
from etils import epath

from rlhf_jax.backend import trim_heap
from rlhf_jax.errors import FunctionError, InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.parsing import to_dict
from rlhf_jax.runtime.run.checkpoint import Checkpoints, freed
from rlhf_jax.runtime.run.folder import (
    Fingerprints,
    changed_length,
    check_same_config,
    check_same_data,
    claim_run_dir,
    disk_errors,
    finished_note,
    is_finished,
    last_metrics,
    read_progress,
    reopen,
)
from rlhf_jax.runtime.run.lock import Lock, locked
from rlhf_jax.runtime.run.metrics import make_writer
from rlhf_jax.runtime.run.progress import Progress, Throughput, show_phase
from rlhf_jax.runtime.run.signals import (
    EvaluationTerminated,
    Interrupted,
    Signals,
    Terminated,
    exit_error,
)
from rlhf_jax.runtime.run.stage import Metrics, Samples, Stage, StageResult


class DivergedError(FloatingPointError):
    """A loss or a gradient is not finite; the message names the step and the last checkpoint."""

    raised_on_all_hosts = True  # all hosts have the same metrics


def run(
    make_stage: Callable[[], Stage],
    config: Any,
    data_fingerprints: Callable[[], Fingerprints] = dict,
) -> StageResult:
    """Trains a stage to its end, from its newest checkpoint if there is one.

    Args:
      make_stage: reads the data and the models; not called when the run is complete.
      config: the configuration of the stage.
      data_fingerprints: those of `Stage.fingerprints` that need no model, to tell whether a run
        that is complete had the same data.

    Raises:
      InputError: the folder cannot be written, is in use by another process, holds a run with
        another configuration or other data, or has checkpoints of which none can be used.
      DivergedError: a loss or gradient is NaN or infinite.
      Interrupted: Ctrl-C or, as `Terminated`, SIGTERM, after the state was saved.
    """
    with Signals() as signals, hosts.failing_together(), locked(config.run_dir) as lock:
        hosts.from_first(claim_run_dir, config)
        _check_shared(config.run_dir)
        if not hosts.from_first(is_finished, config):
            try:
                stage = make_stage()
                with jax.set_mesh(stage.mesh):
                    _train(stage, config, signals, lock)
            except SystemExit as exit:  # of a user's function
                raise exit_error(exit) from exit
        else:
            note = hosts.from_first(finished_note, config.run_dir, data_fingerprints)
            if hosts.is_first():
                print(note, file=sys.stderr)
        return StageResult(config.run_dir, hosts.from_first(last_metrics, config.run_dir))


def _check_shared(run_dir: str) -> None:
    """Raises an InputError if this host does not see the files of the first one."""
    if not (epath.Path(run_dir) / "config.yaml").exists():
        raise InputError(
            f"Process {jax.process_index()} does not see the run folder {run_dir} of process 0; "
            "give --run_dir a folder that all hosts share, or an address such as gs://."
        )


def _train(stage: Stage, config: Any, signals: Signals, lock: Lock) -> None:
    """Trains from the newest checkpoint, or from the beginning, and exports the model."""
    folder = epath.Path(config.run_dir)
    with disk_errors(folder):
        checkpoints = Checkpoints(config.run_dir, config.checkpoint)
    try:
        state, start = _restore(stage, checkpoints, config)
        hosts.from_first(reopen, config)
        shown = config.logging.progress and hosts.is_first()
        with (
            signals.phase("step"),
            make_writer(config, stage.name, start) as writer,
            Progress(stage.total_steps, start, stage.name, shown, stage.scores) as progress,
        ):
            outputs = (checkpoints, writer, progress)
            state = _Loop(stage, config, *outputs, signals, lock).run(state, start)
        if shown:
            show_phase(stage.name, "writing the model and the report")
        with signals.phase("interruptible"):
            with disk_errors(folder):
                state = _exported(stage, state, checkpoints, config)
            lock.check()
            report = stage.finish(state)
        if hosts.is_first():
            where = f"the model is in {folder / 'hf'}"
            where += f", the report in {report}" if report else ""
            print(f"{stage.name}: {where}", file=sys.stderr)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            checkpoints.close()
        raise
    with disk_errors(folder):
        checkpoints.close()


def _restore(stage: Stage, checkpoints: Checkpoints, config: Any) -> tuple[Any, int]:
    """(state, number of steps that it has taken)."""
    state = stage.init_state()
    if checkpoints.latest_step() is None:
        return state, 0
    target = freed(stage.saved(state))

    def check(record):
        check_same_config(config, record["config"])
        check_same_data(config.run_dir, record.get("fingerprints", {}), stage.fingerprints)
        if record["step"] > stage.total_steps:
            raise InputError(
                f"The run in {config.run_dir} has taken {record['step']} steps already, but is to "
                f"end at step {stage.total_steps}; set {' or '.join(config.length_settings)} "
                "higher, or choose another --run_dir."
            )

    restored = checkpoints.restore(target, check)
    assert restored is not None  # there is a checkpoint: it is used, or an error is raised
    if hosts.is_first():
        step = f"step {restored.step} of {stage.total_steps}"
        note = changed_length(config, restored.record["config"], stage.schedule)
        print(f"{stage.name}: continuing from {step}{note}", file=sys.stderr)
    return stage.resumed(state, restored.state), restored.step


def _exported(stage: Stage, state: Any, checkpoints: Checkpoints, config: Any) -> Any:
    """The state whose model is exported: the last one, or that of the best step."""
    best, name = checkpoints.best(), config.checkpoint.best_metric
    if config.checkpoint.export_best and best is None and hosts.is_first():
        print(f"{stage.name}: no step is the best by {name}; the last is taken", file=sys.stderr)
    if not config.checkpoint.export_best or best is None or best[0] == stage.total_steps:
        return state
    target = freed(stage.saved(state))
    restored = checkpoints.restore_best(target) or checkpoints.restore(target, lambda record: None)
    assert restored is not None  # the last step was saved
    if hosts.is_first():
        print(f"{stage.name}: step {restored.step} was the best by {name}", file=sys.stderr)
    return stage.resumed(state, restored.state)


class _Loop:
    """The loop of one run, with the objects that all steps share.

    Attributes:
      state, step: the newest state, and the number of steps that it has taken.
      unlogged: (step, metrics, output) of the steps that are not logged yet.
    """

    def __init__(self, stage, config, checkpoints, writer, progress, signals, lock) -> None:
        self.stage, self.config, self.checkpoints = stage, config, checkpoints
        self.writer, self.progress, self.signals, self.lock = writer, progress, signals, lock
        self.throughput = Throughput(stage.flops_per_token, stage.flops_per_step)
        self.saved_at, self.unlogged = time.monotonic(), list[tuple[int, Any, Any]]()
        self.agree, self.terminated, self.rescuing = hosts.Agreement(3), False, False

    def run(self, state: Any, start: int) -> Any:
        """The state after the last step, which is saved."""
        self.state, self.step = state, start
        self._complete()
        if start < self.stage.total_steps:
            self.progress.phase("compiling")
        try:
            while self.step < self.stage.total_steps:
                self.state, metrics, output = self.stage.step(self.state, self.step)
                self.step += 1
                self.unlogged.append((self.step, metrics, output))
                if self.step == start + 1:
                    trim_heap()  # of the memory of its compilation
                if len(self.unlogged) > 1:
                    self._log()  # the previous step, while this one runs on the device
                self._pause()
        except (Exception, SystemExit) as error:
            self._rescue(error)
            if isinstance(error, FunctionError):
                error.add_progress(self.step, self.checkpoints.latest_step())
            raise
        with disk_errors(self.config.run_dir):
            self.checkpoints.wait()  # an export, which comes next, marks the run as complete
        return self.state

    # --- between steps ----------------------------------------------------------------------------

    def _is_stopping(self) -> bool:
        """Whether this process received a signal; raises the error of a background save."""
        with disk_errors(self.config.run_dir):
            self.checkpoints.check()
        return self.signals.stopping

    def _is_late(self) -> bool:
        """Whether the last checkpoint is older than `checkpoint.minutes`."""
        minutes, waited = self.config.checkpoint.minutes, time.monotonic() - self.saved_at
        return minutes > 0 and waited >= 60.0 * minutes

    def _is_due(self, period: int | None, step: int | None = None) -> bool:
        """Whether something is due after a step: the last one, and each `period` steps.

        Where `period` is None, ten times a run, or after each step of a shorter one.
        """
        step, total = self.step if step is None else step, self.stage.total_steps
        if period is None:
            return 10 * step // total > 10 * (step - 1) // total
        return step == total or (period > 0 and step % period == 0)

    def _pause(self) -> None:
        """Evaluates, samples, logs and saves, each where it is due, and stops after a signal.

        A run that stops does not evaluate: `_complete` does when it continues.
        """
        # Read once per step, and equal on all hosts.
        stopping, late, self.terminated = self.agree(
            self._is_stopping(), self._is_late(), self.signals.terminated
        )
        saving = late or self._is_due(self.config.checkpoint.every)
        evaluating = self._is_due(self.config.logging.eval_every)
        sampling = self._is_due(self.config.logging.samples_every)
        if not (stopping or saving or evaluating or sampling):
            return
        ((_, metrics, output),) = self.unlogged
        self._check(self.step, hosts.to_host(metrics))
        with self.throughput.pause():
            samples = self._output_samples()
        evaluation: Metrics = {}
        if not stopping:
            sampling = sampling and output is None
            evaluation, more, stopping = self._evaluate(evaluating, sampling)
            samples += more
        self._log(evaluation, samples)
        # Last, so that a checkpoint is of a step whose lines are written.
        if saving or stopping or evaluation.get("best/step") == self.step:
            with self.throughput.pause():
                self._save()
            # A signal during this step; several processes agree on it after the next step.
            stopping = stopping or (not hosts.several() and self._is_stopping())
        if stopping:
            self._stop()

    def _complete(self) -> None:
        """Samples before the first step; evaluates and samples where the run was stopped before."""
        evaluations, has_samples = hosts.from_first(read_progress, self.config.run_dir, self.step)
        self.checkpoints.evaluations = evaluations
        logging, started = self.config.logging, self.step > 0
        sampling = self._is_due(logging.samples_every) if started else logging.samples_every != 0
        evaluation, samples, terminated = self._evaluate(
            started and self._is_due(logging.eval_every) and self.step not in evaluations,
            sampling and not has_samples,
        )
        if evaluation:
            self.writer.write(self.step, evaluation)
        self.writer.samples(self.step, samples)
        if terminated:
            self._stop()

    def _evaluate(self, evaluating: bool, sampling: bool) -> tuple[Metrics, Samples, bool]:
        """(evaluation, samples from the state, whether SIGTERM stopped either)."""
        evaluation: Metrics = {}
        samples: Samples = []
        if not (evaluating or sampling):
            return evaluation, samples, False
        self.progress.phase("evaluating" if evaluating else "sampling")
        try:
            with self.throughput.pause(), self.signals.phase("evaluation"):
                if evaluating:
                    evaluation = self.stage.evaluate(self.state)
                    evaluation = self.checkpoints.add_evaluation(self.step, evaluation)
                if sampling:
                    count = self.config.logging.num_samples
                    samples = self.stage.samples(self.state, None, count)
        except EvaluationTerminated:
            return evaluation, samples, True
        return evaluation, samples, False

    def _output_samples(self) -> Samples:
        """The samples in the output of the oldest step that is not logged."""
        step, _, output = self.unlogged[0]
        if output is None or not self._is_due(self.config.logging.samples_every, step):
            return []
        count = self.config.logging.num_samples
        return self._call([], self.stage.samples, self.state, output, count)

    # --- checkpoints and the end ------------------------------------------------------------------

    def _save(self) -> None:
        """Starts to save a checkpoint, but none with parameters that are not finite."""
        self.lock.check()
        self.writer.flush()
        metadata = {
            "config": to_dict(self.config),
            "stage": self.stage.name,
            "fingerprints": self.stage.fingerprints,
        }
        with disk_errors(self.config.run_dir):
            saved = self.checkpoints.save(self.step, self.stage.saved(self.state), metadata)
        if not saved:
            self._raise_diverged(self.step, "a parameter is not finite")
        self.saved_at = time.monotonic()

    def _stop(self) -> NoReturn:
        with disk_errors(self.config.run_dir):
            self.checkpoints.wait()
        terminated = self.terminated or (not hosts.several() and self.signals.terminated)
        kind = Terminated if terminated else Interrupted
        stopped = kind(
            f"Stopped after step {self.step} of {self.stage.total_steps}; everything is saved in "
            f"{self.config.run_dir}. Run the same command again to continue."
        )
        stopped.raised_on_all_hosts = True  # all hosts have agreed to stop
        raise stopped

    def _rescue(self, error: BaseException) -> None:
        """Logs and saves the last step after an error, such as one in a reward function."""
        on_disk = isinstance(error, InputError) and isinstance(error.__cause__, OSError)
        if isinstance(error, DivergedError) or on_disk:
            return  # no step can follow; or the disk is full, and the lines of this step are lost
        if self.step == 0 or any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            return  # before the first step, or the failed step has donated the state
        if not hosts.reach_barrier(f"rescue/{self.stage.name}/{self.step}", 10.0):
            return  # the other hosts, which hold parts of the state, have not failed
        self.rescuing = True
        with contextlib.suppress(Exception, SystemExit):  # the first error is the one to report
            while self.unlogged:
                self._log(samples=self._output_samples())
            self._save()
            self.checkpoints.wait()
            if hosts.is_first() and not isinstance(error, FunctionError):  # which says it itself
                text = f"Step {self.step} is saved in {self.config.run_dir}; the same command "
                self.progress.message(text + "continues from there.")

    # --- metrics ----------------------------------------------------------------------------------

    def _log(self, evaluation: Metrics | None = None, samples: Samples | None = None) -> None:
        """Logs the oldest step that is not logged yet."""
        self.lock.check()
        step, metrics, output = self.unlogged[0]
        values = {key: float(value) for key, value in hosts.to_host(dict(metrics)).items()}
        self._check(step, values)
        self.throughput.add(int(values.pop("perf/tokens", 0.0)))
        logging = self.config.logging
        if self._is_due(logging.eval_every, step) or self._is_due(logging.log_every, step):
            values |= self._call({}, self.stage.observe, output) | (evaluation or {})
            values |= self.throughput.metrics()
            self.writer.write(step, values)
        self.writer.samples(step, samples or [])
        del self.unlogged[0]
        if not self.rescuing:  # perhaps from a closed output
            self.progress.update(step, values)

    def _call(self, empty: Any, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function of the stage; `empty` where it fails in a rescue."""
        try:
            return function(*args)
        except (Exception, SystemExit):
            if not self.rescuing:
                raise
            return empty

    def _check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises a DivergedError where a loss or the gradient norm is not finite."""
        for name in (*self.stage.losses, "train/grad_norm"):
            if name in metrics and not math.isfinite(metrics[name]):
                reason = f"{name} is {float(metrics[name])}"
                self._raise_diverged(step, reason, is_score=name in self.stage.scores)

    def _raise_diverged(self, step: int, reason: str, *, is_score: bool = False) -> NoReturn:
        kept = self.checkpoints.latest_step()
        remedy = "Mend the reward" if is_score else "Lower optimizer.learning_rate"
        where = f"the checkpoint of step {kept}" if kept else "no checkpoint, as none was due"
        raise DivergedError(
            f"{reason} at step {step} of the stage {self.stage.name}; training stopped and kept "
            f"{where}, in {self.config.run_dir}. {remedy} and start again with another --run_dir."
        )
