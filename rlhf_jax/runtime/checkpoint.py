"""Orbax checkpoints of a train state, and the configuration that they belong to."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `checkpoint` of a configuration.

    Attributes:
      every: steps between checkpoints; 0 leaves it to the clock.
      minutes: a checkpoint after the first step that ends so long after the last one; 0 leaves it
        to the steps. The end of a run and an interrupt save in any case.
      keep: how many of the newest are kept.
    """

    every: int = 0
    minutes: float = 10.0
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0 or self.minutes < 0 or self.keep < 1:
            raise InputError(
                "checkpoint.every and checkpoint.minutes must be at least 0 and checkpoint.keep at "
                f"least 1, but are {self.every}, {self.minutes} and {self.keep}."
            )


class Checkpoints:
    """The checkpoints of one run, under `run_dir/checkpoints/STEP`.

    A checkpoint is written under a temporary name and renamed when it is whole, so that the newest
    one can always be restored.
    """

    def __init__(self, run_dir: str, settings: Settings) -> None:
        folder = epath.Path(run_dir).resolve() / "checkpoints"
        # On the CPU an array and its copy on the host can share memory, which the next, donating
        # step would overwrite while a background write is under way.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep,
            create=True,
            enable_async_checkpointing=jax.default_backend() != "cpu",
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Saves the pytree; a step that is there already is left as it is."""
        if self._manager.latest_step() != step:
            with _os_errors():
                self._manager.save(step, args=ocp.args.StandardSave(_written(state)), force=True)

    def restore(self, like: Any) -> Any:
        """The newest checkpoint, with the structure, dtypes and shardings of `like`."""
        step = self._manager.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _written(like))
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return jax.tree.map(lambda old, new: old if new is None else new, like, restored)

    def close(self) -> None:
        """Waits for a write that is under way."""
        with _os_errors():
            self._manager.wait_until_finished()
            self._manager.close()


def _written(state: Any) -> Any:
    """The pytree with None for arrays without an element, which Orbax refuses: a stack of no layers
    has them.
    """
    return jax.tree.map(lambda leaf: leaf if np.size(leaf) else None, state)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Turns the ValueError in which Orbax's storage tells of a full disk into an OSError."""
    try:
        yield
    except ValueError as error:
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise
