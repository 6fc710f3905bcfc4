"""The record that a checkpoint holds beside its arrays, and the reasons why one cannot be read."""

import contextlib
import gc
import io
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

Record = dict[str, Any]

_NAME = "rlhf_jax"
# Errors of the machine or the network: the next attempt may read the files.
_TRANSIENT = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"
)


def with_checksum(record: Record) -> dict[str, Any]:
    """The record and its checksum, as Orbax's custom metadata."""
    return {_NAME: {"crc32": _crc32(record), "record": record}}


def _crc32(record: Record) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def read_record(folder: epath.Path) -> Record:
    """The record of a checkpoint; empty in one of an earlier version.

    Raises:
      OSError, ValueError: it is missing or differs from what was written.
    """
    file = folder / "_CHECKPOINT_METADATA"
    try:
        content = (json.loads(file.read_text())["custom_metadata"] or {}).get(_NAME)
        if content is None:
            return {}
        record, intact = content["record"], _crc32(content["record"]) == content["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is no record") from error
    if not intact:
        raise ValueError(f"{file.name} is not what was saved")
    return record


def config_in(folder: epath.Path) -> Any:
    """The configuration in the newest checkpoint of a folder that can be read, or None."""
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    for step in sorted(steps, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            if config := read_record(folder / str(step)).get("config"):
                return config
    return None


def saved_shapes(folder: epath.Path) -> Any:
    """The pytree of shapes and dtypes of a checkpoint without a record."""
    metadata = ocp.StandardCheckpointHandler().metadata(folder)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)


def short_reason(error: Exception) -> str:
    """An error in a few words: messages of Orbax and TensorStore can be pages long."""
    text = " ".join(str(error).split())
    code = re.match("[A-Z_]{4,}(?=: )", text)
    if code:  # of TensorStore, whose message ends with the name of the array
        name = re.search(r'"([^"]+)/\.zarray"', text)
        return code[0].replace("_", " ").lower() + (f" in {name[1]}" if name else "")
    if isinstance(error, FileNotFoundError):
        return f"{os.path.basename(str(error.filename))} is missing"
    text = re.split(r": \(|\. See ", text)[0][:120]
    return text if type(error) in (ValueError, Exception) else f"{type(error).__name__}: {text}"


def is_transient(error: Exception) -> bool:
    """Whether an error is of the machine rather than of the checkpoint."""
    kinds = (PermissionError, MemoryError, jax.errors.JaxRuntimeError)
    return isinstance(error, kinds) or bool(_TRANSIENT.match(str(error)))


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], None]]:
    """Hides what threads of a failed read print; the read raises its error in any case.

    Orbax closes its event loop at the first error, and each read that ends later prints a warning.
    The block gets a function that waits for these reads.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        yield _end_reads


def _end_reads() -> None:
    """Waits a moment for abandoned reads, and frees their results."""
    time.sleep(0.2)
    gc.collect()
