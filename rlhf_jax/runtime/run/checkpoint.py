"""Orbax checkpoints of a train state: written in the background, verified when they are read."""

import contextlib
import gc
import io
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.run.records import (
    Record,
    array_specs,
    check_same_arrays,
    inspect,
    is_transient,
    read_record,
    short_reason,
    with_checksum,
)
from rlhf_jax.runtime.run.settings import CheckpointSettings

logger = logging.getLogger("rlhf_jax.runtime.run.checkpoint")


class Restored(NamedTuple):
    """A checkpoint that was read and is undamaged: its arrays, and the metadata saved with them."""

    step: int
    state: Any
    record: Record


class Checkpoints:
    """The checkpoints of one run, under `run_dir/checkpoints/STEP`.

    A checkpoint is written in the background under a temporary name, and renamed when it is
    complete. Its record holds shape, dtype and checksum of each array and the caller's metadata.

    Attributes:
      evaluations: metrics by step, of which `settings.best_metric` defines the best step. A caller
        that restores a checkpoint sets those of earlier steps.
    """

    def __init__(self, run_dir: str, settings: CheckpointSettings) -> None:
        self._run_dir, self._settings = run_dir, settings
        self._folder = epath.Path(run_dir).resolve() / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._opened: ocp.CheckpointManager | None = None
        self._steps = self._read_steps()
        self.evaluations: dict[int, dict[str, float]] = {}
        self._warned = False

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Opened by the first save: it lists the steps in the folder once."""
        if self._opened is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self,
                cleanup_tmp_directories=True,  # of saves that were killed
                lightweight_initialize=True,  # without reading the checkpoints
            )
            self._opened = ocp.CheckpointManager(self._folder, options=options)
        return self._opened

    def _read_steps(self) -> list[int]:
        """The steps of complete checkpoints, as the first host lists them."""
        return hosts.from_first(lambda: sorted(ocp.utils.checkpoint_steps(self._folder)))

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None, after pending writes have ended."""
        with contextlib.suppress(Exception):  # which `check` and the next save raise
            self.wait()
        return max(self._steps, default=None)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> bool:
        """Starts to save a pytree of arrays, unless the step is saved already.

        Returns False, and saves nothing, where an array is not finite. Raises an OSError where the
        disk is full or cannot be written, perhaps of the previous save.
        """
        if step in self._steps:
            return True
        arrays = _without_empty(state)
        finite, checksums = hosts.to_host(inspect(arrays))
        if not finite:
            return False
        specs = array_specs(arrays).items()
        saved = {
            name: [*spec, int(checksum)]
            for (name, spec), checksum in zip(specs, checksums, strict=True)
        }
        record = {**(metadata or {}), "step": step, "arrays": saved}
        with _os_errors():
            self._manager.save(
                step,
                args=ocp.args.StandardSave(_copied_on_cpu(arrays)),
                custom_metadata=with_checksum(record),
                force=True,
            )
        self._steps = list(self._manager.all_steps())
        return True

    def check(self) -> None:
        """Raises the error of a save in the background that has ended with one."""
        # Not by `check_for_errors`, which forgets the error: Orbax's own thread could then miss it,
        # and delete the checkpoint before.
        if self._opened is not None and not self._opened.is_saving_in_progress():
            with _os_errors():
                self._opened.wait_until_finished()

    def wait(self) -> None:
        """Waits for a save in the background, and raises its error."""
        if self._opened is None:
            return
        try:
            with _os_errors():
                self._opened.wait_until_finished()
        finally:
            self._steps = self._read_steps()

    def close(self) -> None:
        """Waits for a save in the background, and ends the threads."""
        if self._opened is not None:
            with _os_errors():
                self._opened.close()

    # --- the best ---------------------------------------------------------------------------------

    def add_evaluation(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Records the evaluation of a step; returns it with "best/step" and "best/value" so far."""
        values = {key: float(value) for key, value in metrics.items()}
        name = self._settings.best_metric
        if values and name is not None and name not in values and not self._warned:
            self._warned = True
            logger.warning(
                "checkpoint.best_metric is %s, which is not evaluated: no step is the best. The "
                "evaluation has %s.",
                name,
                ", ".join(sorted(values)),
            )
        self.evaluations[step] = values
        if not values or (best := self.best(step)) is None:
            return values
        return values | {"best/step": float(best[0]), "best/value": best[1]}

    def best(self, unsaved_step: int | None = None) -> tuple[int, float] | None:
        """(step, value) of the best evaluation of the saved steps and `unsaved_step`, or None.

        Of equal values the first is the best; values that are not finite do not count.
        """
        return self._best_of({*self._steps, unsaved_step})

    def _best_of(self, steps: set) -> tuple[int, float] | None:
        name, sign = self._settings.best_metric, 1 if self._settings.best_mode == "min" else -1
        values = {
            step: metrics[name]
            for step, metrics in self.evaluations.items()
            if step in steps and name in metrics and math.isfinite(metrics[name])
        }
        if not values:
            return None
        step = min(values, key=lambda each: (sign * values[each], each))
        return step, values[step]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> list[bool]:
        """Orbax's preservation policy: the newest checkpoints are kept, and the best one."""
        del context
        steps = [info.step for info in checkpoints]
        kept = {*steps[-self._settings.keep :], *(self._best_of({*steps}) or ())[:1]}
        return [step in kept for step in steps]

    # --- reading ----------------------------------------------------------------------------------

    def restore(self, target: Any, check: Callable[[Record], None]) -> Restored | None:
        """The newest undamaged checkpoint; None without any checkpoint.

        Newer ones that cannot be read, or have other checksums, are reported and renamed.

        Args:
          target: a pytree that gives structure, dtypes and shardings.
          check: raises an InputError for the record of another run's checkpoint.

        Raises:
          InputError: no checkpoint can be used, or the newest that can is of another model or
            configuration. All of them are left unchanged.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._steps, reverse=True):
            restored, reason = self._read(step, target, check)
            if restored is not None:
                for each, why in damaged.items():
                    self._put_aside(each, why, step)
                return restored
            damaged[step] = reason
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"No checkpoint in {self._folder} can be used ({reasons}); put the folder back from"
                " a copy, or choose another --run_dir to start anew."
            )
        return None

    def restore_best(self, target: Any) -> Restored | None:
        """The best checkpoint that can be read; better ones that cannot be read are reported."""
        while (best := self.best()) is not None:
            restored, reason = self._read(best[0], target, lambda record: None)
            if restored is not None:
                return restored
            logger.warning(
                "The best checkpoint, of step %d in %s, cannot be used (%s); the next best one is "
                "taken.",
                best[0],
                self._folder,
                reason,
            )
            del self.evaluations[best[0]]
        return None

    def _read(
        self, step: int, target: Any, check: Callable[[Record], None]
    ) -> tuple[Restored | None, str]:
        """(the checkpoint of a step, ""), or (None, the reason why it cannot be used)."""
        state: Any = None
        record: Record = {}
        reason = "another host cannot read it"
        # Orbax closes its event loop at the first error: each later read of it prints a warning.
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                state, record = self._load(step, target, check)
            except Exception as error:
                if isinstance(error, InputError) or is_transient(error):
                    raise
                reason = short_reason(error)
            # All hosts have to read it, and all of them compute the checksums together.
            if _on_all_hosts(state is not None):
                reason = _damage(state, record)
            if reason:
                time.sleep(0.2)  # for the abandoned reads, whose results are freed
                gc.collect()
                return None, reason
        state = jax.tree.map(lambda old, new: old if new is None else new, target, state)
        return Restored(step, state, record), ""

    def _load(self, step: int, target: Any, check: Callable[[Record], None]) -> tuple[Any, Record]:
        """The arrays that this host holds of a checkpoint, and the record."""
        folder, target = self._folder / str(step), _without_empty(target)
        record = read_record(folder)
        if record["step"] != step:
            raise InputError(
                f"{folder} holds the checkpoint of step {record['step']}: rename it to "
                f"{record['step']}, or move it away, to continue."
            )
        check(record)
        saved = {name: spec[:2] for name, spec in record["arrays"].items()}
        name = f"The checkpoint of step {step} in {self._run_dir}"
        check_same_arrays(saved, array_specs(target), name)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        state = ocp.StandardCheckpointHandler().restore(
            folder / "default", args=ocp.args.StandardRestore(abstract)
        )
        return state, record

    def _put_aside(self, step: int, reason: str, used_step: int) -> None:
        """Renames a damaged checkpoint to `bad-STEP`."""
        path, number = self._folder / f"bad-{step}", 1
        while path.exists():
            path, number = self._folder / f"bad-{step}-{number}", number + 1
        logger.warning(
            "The checkpoint of step %d in %s cannot be used (%s); it is now %s, and the run "
            "continues from step %d.",
            step,
            self._folder,
            reason,
            path.name,
            used_step,
        )
        if hosts.is_first():
            (self._folder / str(step)).rename(path)
        if hosts.several():
            multihost_utils.sync_global_devices(f"put aside {step}")
        self._steps.remove(step)


def freed(saved: Any) -> Any:
    """Shapes, dtypes and shardings of a pytree, whose arrays are deleted to free their memory."""

    def free(leaf):
        if not leaf.size:
            return leaf
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        leaf.delete()
        return shape

    return jax.tree.map(free, saved)


def _on_all_hosts(flag: bool) -> bool:
    """Whether the flag is set on all hosts; all of them have to call this."""
    if not hosts.several():
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def _damage(state: Any, record: Record) -> str:
    """The first array that differs from what was saved, or ""; the same on all hosts."""
    checksums = hosts.to_host(inspect(state)[1])
    for name, checksum in zip(array_specs(state), checksums, strict=True):
        if int(checksum) != record["arrays"][name][2]:
            return f"{name} is not what was saved"
    return ""


def _without_empty(state: Any) -> Any:
    """The pytree with None for arrays of size 0 (a stack of no layers), which Orbax refuses."""
    return jax.tree.map(lambda leaf: leaf if np.size(leaf) else None, state)


def _copied_on_cpu(state: Any) -> Any:
    """The pytree, on the CPU a copy of it.

    Orbax copies the arrays of accelerators to the host before it returns. On the CPU it reads their
    own memory in the background, which the next step, donating the state, overwrites.
    """

    def copied(array):
        shards = [jax.device_put(np.array(s.data), s.device) for s in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)

    return jax.tree.map(copied, state) if jax.default_backend() == "cpu" else state


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Turns the ValueError in which Orbax's storage reports a full disk into an OSError."""
    try:
        yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise
