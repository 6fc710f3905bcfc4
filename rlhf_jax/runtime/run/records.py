"""What a checkpoint says of itself beside its arrays, and what is wrong with a damaged one."""

import contextlib
import gc
import io
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

Record = dict[str, Any]

_NAME = "rlhf_jax"
# What is no fault of the files: another attempt may read them.
_PASSING = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"
)


def sealed(record: Record) -> dict[str, Any]:
    """What Orbax is to write beside the arrays: the record, and a checksum of it."""
    return {_NAME: {"crc32": _crc32(record), "record": record}}


def _crc32(record: Record) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def read_record(folder: epath.Path) -> Record:
    """The record of a checkpoint; empty in one of an earlier version.

    Raises:
      OSError, ValueError: it is missing or not what was written.
    """
    file = folder / "_CHECKPOINT_METADATA"
    try:
        found = (json.loads(file.read_text())["custom_metadata"] or {}).get(_NAME)
        whole = found is None or _crc32(found["record"]) == found["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is no record") from error
    if not whole:
        raise ValueError(f"{file.name} is not what was saved")
    return {} if found is None else found["record"]


def evaluated_in(folder: epath.Path, steps: Sequence[int]) -> dict[int, dict[str, float]]:
    """What the checkpoints tell of evaluations, by step; of those that can be read."""
    found: dict[int, dict[str, float]] = {}
    for step in steps:
        with contextlib.suppress(OSError, ValueError):
            evaluated = read_record(folder / str(step)).get("evaluated", {})
            found |= {int(each): metrics for each, metrics in evaluated.items()}
    return {step: metrics for step, metrics in found.items() if step in steps}


def config_in(folder: epath.Path) -> Any:
    """The configuration of the run that the newest checkpoint tells of, or None."""
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    for step in sorted(steps, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            if found := read_record(folder / str(step)).get("config"):
                return found
    return None


def saved_shapes(folder: epath.Path) -> Any:
    """The tree of a checkpoint without a record, of things with shape and dtype."""
    metadata = ocp.StandardCheckpointHandler().metadata(folder)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)


def reason_of(error: Exception) -> str:
    """What is wrong in a few words: those of Orbax and TensorStore can be pages."""
    text = " ".join(str(error).split())
    code = re.match("[A-Z_]{4,}(?=: )", text)
    if code:  # TensorStore's, whose innermost complaint names the array
        name = re.search(r'"([^"]+)/\.zarray"', text)
        return code[0].replace("_", " ").lower() + (f" in {name[1]}" if name else "")
    if isinstance(error, FileNotFoundError):
        return f"{os.path.basename(str(error.filename))} is missing"
    text = re.split(r": \(|\. See ", text)[0][:120]
    return text if type(error) in (ValueError, Exception) else f"{type(error).__name__}: {text}"


def is_passing(error: Exception) -> bool:
    """Whether the machine rather than the checkpoint is at fault."""
    kinds = (PermissionError, MemoryError, jax.errors.JaxRuntimeError)
    return isinstance(error, kinds) or bool(_PASSING.match(str(error)))


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], None]]:
    """Keeps off the terminal what the threads of a read print that failed; what it failed by is an
    exception all the same. The function that the block gets waits for them.

    Orbax closes its event loop at the first error, and each read that ends later complains of that.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        yield _end_reads


def _end_reads() -> None:
    """Lets reads end that nobody waits for, and frees what they gave."""
    time.sleep(0.2)
    gc.collect()
