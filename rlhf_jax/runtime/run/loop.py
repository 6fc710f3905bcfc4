"""The training loop of every stage: steps, logs, evaluations, checkpoints, and its safe end."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from etils import epath

from rlhf_jax.backend import trim_heap
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.parsing import to_dict
from rlhf_jax.runtime.run.checkpoint import Checkpoints, freed
from rlhf_jax.runtime.run.folder import (
    check_same_config,
    claim_run_dir,
    disk_errors,
    is_finished,
    last_metrics,
    read_progress,
)
from rlhf_jax.runtime.run.metrics import make_writer
from rlhf_jax.runtime.run.progress import Progress, Throughput, show_phase
from rlhf_jax.runtime.run.signals import EvaluationTerminated, Interrupted, Signals, Terminated
from rlhf_jax.runtime.run.stage import Metrics, Samples, Stage, StageResult


class DivergedError(FloatingPointError):
    """A loss or a gradient is not finite; the message names the step and the last checkpoint."""

    raised_on_all_hosts = True  # all hosts have the same metrics


def run(make_stage: Callable[[], Stage], config: Any) -> StageResult:
    """Trains a stage to its end, from its newest checkpoint if there is one.

    Args:
      make_stage: reads the data and the models; not called when the run is complete.
      config: the configuration of the stage.

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
    """Raises an InputError if this host does not see the files of the first one."""
    if not (epath.Path(run_dir) / "config.yaml").exists():
        raise InputError(
            f"Process {jax.process_index()} does not see the run folder {run_dir} of process 0; "
            "give --run_dir a folder that all hosts share, or an address such as gs://."
        )


def _train(stage: Stage, config: Any, signals: Signals) -> None:
    """Trains from the newest checkpoint, or from the beginning, and exports the model."""
    folder = epath.Path(config.run_dir)
    with disk_errors(folder):
        checkpoints = Checkpoints(config.run_dir, config.checkpoint)
    try:
        state, start = _restore(stage, checkpoints, config)
        shown = config.logging.progress and hosts.is_first()
        with (
            signals.phase("step"),
            make_writer(config, stage.name, start) as writer,
            Progress(stage.total_steps, start, stage.name, shown) as progress,
        ):
            state = _Loop(stage, config, checkpoints, writer, progress, signals).run(state, start)
        if shown:
            show_phase(stage.name, "writing the model and the report")
        with disk_errors(folder), signals.phase("interruptible"):
            report = stage.finish(_exported(stage, state, checkpoints, config))
        if hosts.is_first():
            where = f"the model is in {folder / 'hf'}"
            where += f", the report in {report}" if report else ""
            print(f"{stage.name}: {where}", file=sys.stderr)
    finally:
        with disk_errors(folder):
            checkpoints.close()


def _restore(stage: Stage, checkpoints: Checkpoints, config: Any) -> tuple[Any, int]:
    """(state, number of steps that it has taken)."""
    state = stage.init_state()
    if checkpoints.latest_step() is None:
        return state, 0
    target = freed(stage.saved(state))
    restored = checkpoints.restore(
        target, lambda record: check_same_config(config, record["config"])
    )
    assert restored is not None  # there is a checkpoint: it is used, or an error is raised
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
    """The loop of one run, with the objects that all steps share."""

    def __init__(self, stage, config, checkpoints, writer, progress, signals) -> None:
        self.stage, self.config, self.checkpoints = stage, config, checkpoints
        self.writer, self.progress, self.signals = writer, progress, signals
        self.throughput = Throughput(stage.flops_per_token, stage.flops_per_step)
        self.saved_at, self.logged_step = time.monotonic(), 0
        self.agree, self.terminated, self.rescuing = hosts.Agreement(3), False, False

    def run(self, state: Any, start: int) -> Any:
        """The state after the last step, which is saved."""
        self._complete(state, start)
        pending: tuple[int, Any, Any] | None = None
        for index in range(start, self.stage.total_steps):
            if index == start:
                self.progress.phase("compiling")
            try:
                state, metrics, output = self.stage.step(state, index)
            except Exception:
                self._rescue(state, index, pending)
                raise
            if index == start:
                trim_heap()  # of the memory of its compilation
            # The previous step is logged while this one runs on the device.
            previous, pending = pending, (index + 1, metrics, output)
            if previous is not None:
                with self._rescued(state, previous, pending):
                    self._log(*previous)
            # Read once per step, and equal on all hosts.
            stopping, late, self.terminated = self.agree(
                self._is_stopping(), self._is_late(), self.signals.terminated
            )
            step = index + 1
            saving = late or self._is_due(step, self.config.checkpoint.every)
            pausing = saving or self._is_evaluation_due(step) or self._are_samples_due(step)
            if stopping or pausing:
                with self._rescued(state, pending):
                    stopping = self._pause(state, *pending, stopping=stopping, saving=saving)
                pending = None
            if stopping:
                self._stop(step)
        with disk_errors(self.config.run_dir):
            self.checkpoints.wait()  # an export, which comes next, marks the run as complete
        return state

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

    def _is_due(self, step: int, period: int) -> bool:
        """Whether something is due after a step: the last one, or each `period` steps."""
        return step == self.stage.total_steps or (period > 0 and step % period == 0)

    def _is_evaluation_due(self, step: int) -> bool:
        return self._is_due(step, self.config.logging.eval_every)

    def _are_samples_due(self, step: int) -> bool:
        return self._is_due(step, self.config.logging.samples_every)

    def _pause(self, state, step, metrics, output, *, stopping: bool, saving: bool) -> bool:
        """Evaluates, samples, logs and saves, each where it is due; returns whether to stop.

        A run that stops does not evaluate: `_complete` does when it continues.
        """
        self._check(step, hosts.to_host(metrics))
        samples = self._output_samples(state, step, output)
        evaluation: Metrics = {}
        if not stopping:
            sampling = output is None and self._are_samples_due(step)
            evaluation, more, stopping = self._evaluate(
                state, step, evaluating=self._is_evaluation_due(step), sampling=sampling
            )
            samples += more
        self._log(step, metrics, output, evaluation)
        self.writer.samples(step, samples)
        # Last, so that a checkpoint is of a step whose lines are written.
        if saving or stopping or evaluation.get("best/step") == step:
            with self.throughput.pause():
                self._save(step, state)
            # A signal during this step; several processes agree on it after the next step.
            return stopping or (not hosts.several() and self._is_stopping())
        return stopping

    def _complete(self, state: Any, step: int) -> None:
        """Evaluates and samples at the step of a checkpoint, where the run was stopped before."""
        evaluations, has_samples = hosts.from_first(read_progress, self.config.run_dir, step)
        self.checkpoints.evaluations = evaluations
        if step == 0:
            return
        evaluation, samples, terminated = self._evaluate(
            state,
            step,
            evaluating=self._is_evaluation_due(step) and step not in evaluations,
            sampling=self._are_samples_due(step) and not has_samples,
        )
        if evaluation:
            self.writer.write(step, evaluation)
        self.writer.samples(step, samples)
        if terminated:
            self._stop(step)

    def _evaluate(
        self, state: Any, step: int, *, evaluating: bool, sampling: bool
    ) -> tuple[Metrics, Samples, bool]:
        """(evaluation, samples from the state, whether SIGTERM stopped either)."""
        evaluation: Metrics = {}
        samples: Samples = []
        if not (evaluating or sampling):
            return evaluation, samples, False
        self.progress.phase("evaluating" if evaluating else "sampling")
        try:
            with self.throughput.pause(), self.signals.phase("evaluation"):
                if evaluating:
                    evaluation = self.checkpoints.add_evaluation(step, self.stage.evaluate(state))
                if sampling:
                    samples = self.stage.samples(state, None, self.config.logging.num_samples)
        except EvaluationTerminated:
            return evaluation, samples, True
        return evaluation, samples, False

    def _output_samples(self, state: Any, step: int, output: Any) -> Samples:
        """The samples that a step's output has; it is lost when the process ends."""
        if output is None or not self._are_samples_due(step):
            return []
        return self.stage.samples(state, output, self.config.logging.num_samples)

    # --- checkpoints and ends ---------------------------------------------------------------------

    def _save(self, step: int, state: Any) -> None:
        """Starts to save a checkpoint, but none with parameters that are not finite."""
        self.writer.flush()
        metadata = {"config": to_dict(self.config), "stage": self.stage.name}
        with disk_errors(self.config.run_dir):
            saved = self.checkpoints.save(step, self.stage.saved(state), metadata)
        if not saved:
            self._raise_diverged(step, "a parameter is not finite")
        self.saved_at = time.monotonic()

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

    @contextlib.contextmanager
    def _rescued(self, state: Any, *pending: tuple) -> Iterator[None]:
        """Saves the state after the last of these steps if a user's function in the block fails."""
        try:
            yield
        except DivergedError:
            raise  # no step can follow
        except Exception as error:
            # On a full disk the lines of these steps are lost: the steps have to be repeated.
            if not isinstance(error.__cause__, OSError):
                self._rescue(state, pending[-1][0], *pending)
            raise

    def _rescue(self, state: Any, step: int, *pending: tuple | None) -> None:
        """Saves the state of `step` after an error, such as one in a reward function.

        Before it logs the `pending` steps: (step, metrics, output) of each that may not be logged.
        """
        if step == 0 or any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return  # before the first step, or the failed step has donated the state
        if not hosts.reach_barrier(f"rescue/{self.stage.name}/{step}", 10.0):
            return  # the other hosts, which hold parts of the state, have not failed
        self.rescuing = True
        with contextlib.suppress(Exception):  # the first error is the one to report
            for each in pending:
                if each is not None and each[0] > self.logged_step:
                    self._log(*each)
                    self.writer.samples(each[0], self._output_samples(state, each[0], each[2]))
            self._save(step, state)
            self.checkpoints.wait()
            where = f"is saved in {self.config.run_dir}"
            if hosts.is_first():
                self.progress.message(
                    f"Step {step} {where}; the same command continues from there."
                )

    # --- metrics ----------------------------------------------------------------------------------

    def _log(self, step, metrics, output, evaluation: Metrics | None = None) -> None:
        values = {key: float(value) for key, value in hosts.to_host(dict(metrics)).items()}
        self._check(step, values)
        self.throughput.add(int(values.pop("perf/tokens", 0.0)))
        if self._is_evaluation_due(step) or self._is_due(step, self.config.logging.log_every):
            values |= self._observe(output) | (evaluation or {}) | self.throughput.metrics()
            self.writer.write(step, values)
        self.logged_step = step
        self.progress.update(step, values)

    def _observe(self, output: Any) -> Metrics:
        """The metrics of a step's output; {} where that fails in a rescue."""
        try:
            return self.stage.observe(output)
        except Exception:
            if not self.rescuing:
                raise
            return {}

    def _check(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises a DivergedError where a loss or the gradient norm is not finite."""
        for name in (*self.stage.losses, "train/grad_norm"):
            if name in metrics and not math.isfinite(metrics[name]):
                self._raise_diverged(step, f"{name} is {float(metrics[name])}")

    def _raise_diverged(self, step: int, reason: str) -> NoReturn:
        kept = self.checkpoints.latest_step()
        where = f"the checkpoint of step {kept}" if kept else "no checkpoint, as none was due"
        raise DivergedError(
            f"{reason} at step {step} of the stage {self.stage.name}; training stopped "
            f"and kept {where}, in {self.config.run_dir}. Lower optimizer.learning_rate and start "
            "again with another --run_dir."
        )
