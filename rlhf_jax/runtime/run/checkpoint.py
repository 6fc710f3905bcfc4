"""Orbax checkpoints of a train state: written in the background, and checked when they are read."""

import contextlib
import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.run.checksums import check_same, described, inspect
from rlhf_jax.runtime.run.records import (
    Record,
    evaluated_in,
    is_passing,
    quiet,
    read_record,
    reason_of,
    saved_shapes,
    sealed,
)

logger = logging.getLogger("rlhf_jax.runtime.run.checkpoint")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `checkpoint` of a configuration.

    Attributes:
      every: steps between checkpoints; 0 leaves it to the clock.
      minutes: a checkpoint after the first step that ends so long after the last one; 0 leaves it
        to the steps. The end of a run, Ctrl-C and SIGTERM save in any case.
      keep: how many of the newest are kept.
      best_metric: a metric of the evaluations, say eval/loss, by which the best step is found; its
        checkpoint is kept besides the newest, and an evaluation that is the best so far is followed
        by one. Null: none.
      best_mode: whether the smallest or the largest value is the best.
      export_best: write the model of the best step to `hf/` rather than that of the last one.
    """

    every: int = 0
    minutes: float = 10.0
    keep: int = 2
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    export_best: bool = False

    def __post_init__(self) -> None:
        if self.every < 0 or self.minutes < 0 or self.keep < 1:
            raise InputError(
                "checkpoint.every and checkpoint.minutes must be at least 0 and checkpoint.keep at "
                f"least 1, but are {self.every}, {self.minutes} and {self.keep}."
            )
        if self.best_mode not in ("min", "max"):
            raise InputError(f"checkpoint.best_mode must be min or max, but is {self.best_mode!r}.")
        if self.export_best and self.best_metric is None:
            raise InputError(
                "checkpoint.export_best needs a metric to judge by; give --checkpoint.best_metric "
                "one of the evaluation's, say eval/loss, or set checkpoint.export_best to false."
            )


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read and found whole.

    Attributes:
      step: whose it is.
      state: with the structure, dtypes and shardings that were asked for.
      record: what was saved beside the arrays; empty in a checkpoint of an earlier version.
    """

    step: int
    state: Any
    record: Record


class Checkpoints:
    """The checkpoints of one run, under `run_dir/checkpoints/STEP`.

    A checkpoint is written under a temporary name and renamed when it is whole, in the background:
    `save` returns when the state is copied. Beside the arrays it holds a record with the shape,
    dtype and checksum of each, and what else the caller gives, all under a checksum of its own.
    """

    def __init__(self, run_dir: str, settings: Settings) -> None:
        self._run_dir, self._settings = run_dir, settings
        self._folder = epath.Path(run_dir).resolve() / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._steps = self._found()
        self._evaluated = evaluated_in(self._folder, self._steps)
        self._made: ocp.CheckpointManager | None = None

    def _found(self) -> list[int]:
        """The steps of whole checkpoints, as the first host sees them."""
        return hosts.from_first(_steps_in, str(self._folder))

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None; waits for one that is being written."""
        with contextlib.suppress(Exception):  # which `wait` tells of
            self.wait()
        return max(self._steps, default=None)

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of the step, if only one that is being written."""
        return step in self._steps

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bool:
        """Begins to save the pytree, unless the step is there already.

        Args:
          metrics: of the evaluation at this step, if there was one.
          more: what else belongs into the record, ready for JSON.

        Returns:
          False where a parameter is not finite; nothing is saved then.

        Raises:
          OSError: the disk is full or cannot be written; it may be that of the save before.
        """
        if self.holds(step):
            return True
        written = _written(state)
        finite, sums = hosts.to_host(inspect(written))
        if not finite:
            return False
        arrays = described(written)
        for place, name in enumerate(arrays):
            arrays[name].append(int(sums[place]))
        self.evaluated(step, metrics or {})
        known = {*self._steps, step}
        evaluated = {str(key): self._evaluated[key] for key in self._evaluated if key in known}
        record = {**(more or {}), "step": step, "arrays": arrays, "evaluated": evaluated}
        with _os_errors():
            self._manager.save(
                step,
                args=ocp.args.StandardSave(_private(written)),
                custom_metadata=sealed(record),
                force=True,
            )
        self._steps = list(self._manager.all_steps())
        return True

    def check(self) -> None:
        """Raises what a save in the background has failed by, if it has."""
        if self._made is not None:
            with _os_errors():
                self._made.check_for_errors()

    def wait(self) -> None:
        """Waits for a write that is under way, and raises what it fails by."""
        if self._made is None:
            return
        try:
            with _os_errors():
                self._made.wait_until_finished()
        finally:
            self._steps = self._found()

    def close(self) -> None:
        """Waits for a write that is under way, and lets go of the threads."""
        if self._made is not None:
            with _os_errors():
                self._made.wait_until_finished()
                self._made.close()

    # --- the best ---------------------------------------------------------------------------------

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes the evaluation of a step; the next checkpoint tells of it."""
        if metrics:
            self._evaluated[step] = {name: float(value) for name, value in metrics.items()}

    def best(
        self, step: int | None = None, metrics: Mapping[str, float] | None = None
    ) -> tuple[int, float] | None:
        """(step, value) of the best evaluation among the checkpoints, or None without any.

        Args:
          step, metrics: an evaluation that counts as well, though it is not saved yet.

        Of equal ones it is the first. What is not finite is never the best.
        """
        found = {each: self._evaluated.get(each, {}) for each in self._steps}
        if step is not None:
            found[step] = dict(metrics or {})
        return self._best_of(found)

    def _best_of(self, found: Mapping[int, Mapping[str, float]]) -> tuple[int, float] | None:
        name, sign = self._settings.best_metric, 1 if self._settings.best_mode == "min" else -1
        if name is None:
            return None
        values = {
            step: float(metrics[name])
            for step, metrics in found.items()
            if name in metrics and math.isfinite(metrics[name])
        }
        if not values:
            return None
        step = min(values, key=lambda each: (sign * values[each], each))
        return step, values[step]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> list[bool]:
        """Which checkpoints stay: the newest, and the best one. Orbax asks at each save."""
        del context
        steps = [info.step for info in checkpoints]
        best = self._best_of({step: self._evaluated.get(step, {}) for step in steps})
        kept = {*steps[-self._settings.keep :], *(best or ())[:1]}
        return [step in kept for step in steps]

    # --- reading ----------------------------------------------------------------------------------

    def restore(self, like: Any, check: Callable[[Record], None]) -> Restored | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Newer ones that cannot be read, or are not what was saved, are reported and moved aside.

        Args:
          like: gives the structure, dtypes and shardings.
          check: raises an InputError for the record of another run's checkpoint.

        Raises:
          InputError: there are checkpoints, but none that can be used; or the newest one that can
            is of another model or configuration. All are left as they are.
        """
        bad: dict[int, str] = {}
        for step in sorted(self._steps, reverse=True):
            restored, reason = self._read(step, like, check)
            if restored is not None:
                for each, why in bad.items():
                    self._put_aside(each, why, step)
                return restored
            bad[step] = reason
        if bad:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in bad.items())
            raise InputError(
                f"No checkpoint in {self._folder} can be used ({reasons}); put the folder back from"
                " a copy, or choose another --run_dir to start anew."
            )
        return None

    def restore_best(self, like: Any) -> Restored | None:
        """The checkpoint of the best step that can be read, reporting better ones that cannot."""
        while (best := self.best()) is not None:
            restored, reason = self._read(best[0], like, lambda record: None)
            if restored is not None:
                return restored
            logger.warning(
                "The best checkpoint, of step %d in %s, cannot be used (%s); the next best one is "
                "taken.",
                best[0],
                self._folder,
                reason,
            )
            self._evaluated.pop(best[0])
        return None

    def _read(
        self, step: int, like: Any, check: Callable[[Record], None]
    ) -> tuple[Restored | None, str]:
        """The checkpoint of a step; or None, and what is wrong with it."""
        with quiet() as wait:
            state: Any = None
            record: Record = {}
            reason = ""
            try:
                state, record = self._loaded(step, like, check)
            except InputError:
                raise
            except Exception as error:
                if is_passing(error):
                    raise
                reason = reason_of(error)
            # What one host cannot read, none can go on from; and the checksums need all of them.
            if _all_hosts(state is not None):
                reason = _damage(state, record)
            else:
                reason = reason or "another host cannot read it"
            if reason:
                wait()
                return None, reason
        whole = jax.tree.map(lambda old, new: old if new is None else new, like, state)
        return Restored(step, whole, record), ""

    def _loaded(self, step: int, like: Any, check: Callable[[Record], None]) -> tuple[Any, Record]:
        """The arrays of a checkpoint as this host reads them, and the record."""
        folder, written = self._folder / str(step), _written(like)
        record = read_record(folder)
        name = f"The checkpoint of step {step} in {self._run_dir}"
        if record:
            check(record)
            saved = {key: value[:2] for key, value in record["arrays"].items()}
        else:
            saved = described(saved_shapes(folder / "default"))
        check_same(saved, described(written), name)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, written)
        state = ocp.StandardCheckpointHandler().restore(
            folder / "default", args=ocp.args.StandardRestore(abstract)
        )
        return state, record

    def _put_aside(self, step: int, reason: str, used: int) -> None:
        place = self._folder / f"bad-{step}"
        number = 1
        while place.exists():
            place, number = self._folder / f"bad-{step}-{number}", number + 1
        logger.warning(
            "The checkpoint of step %d in %s cannot be used (%s); it is now %s, and the run "
            "continues from step %d.",
            step,
            self._folder,
            reason,
            place.name,
            used,
        )
        if hosts.is_first():
            (self._folder / str(step)).rename(place)
        if hosts.several():
            multihost_utils.sync_global_devices(f"put aside {step}")
        self._steps.remove(step)
        self._evaluated.pop(step, None)

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Made when it is first needed: it knows the steps that are there then."""
        if self._made is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self,
                cleanup_tmp_directories=True,  # of saves that were killed
                lightweight_initialize=True,  # what others hold was read, or put aside
            )
            self._made = ocp.CheckpointManager(self._folder, options=options)
        return self._made


def _steps_in(folder: str) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(epath.Path(folder)))


def _all_hosts(flag: bool) -> bool:
    """Whether all hosts say so; all have to call it."""
    if not hosts.several():
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def _damage(state: Any, record: Record) -> str:
    """What is not as it was saved, or "" if all is; the same on all hosts."""
    if not record:
        return ""
    sums = hosts.to_host(inspect(state)[1])
    for place, name in enumerate(described(state)):
        if int(sums[place]) != record["arrays"][name][2]:
            return f"{name} is not what was saved"
    return ""


def _written(state: Any) -> Any:
    """The pytree with None for arrays without an element, which Orbax refuses: a stack of no layers
    has them.
    """
    return jax.tree.map(lambda leaf: leaf if np.size(leaf) else None, state)


def _private(state: Any) -> Any:
    """The arrays as nobody changes them while they are written.

    On accelerators Orbax copies them to the host before it returns. On the CPU there is no other
    host: the array's own memory would be read, which the next, donating step overwrites.
    """
    return jax.tree.map(_copied, state) if jax.default_backend() == "cpu" else state


def _copied(array: jax.Array) -> jax.Array:
    shards = [
        jax.device_put(np.array(shard.data), shard.device) for shard in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Turns the ValueError in which Orbax's storage tells of a full disk into an OSError."""
    try:
        yield
    except ValueError as error:
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise
