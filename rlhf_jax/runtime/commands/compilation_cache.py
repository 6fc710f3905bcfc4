"""Compiled programs are kept on disk for the next command with the same programs."""

import contextlib
import importlib.util
import logging
import os
import time
import warnings
from pathlib import Path

import jax

logger = logging.getLogger("rlhf_jax.runtime.commands.compilation_cache")

# JAX's settings, and their values here unless the environment sets them.
SETTINGS = {
    # On two CPU cores, writing and reading most of the others takes longer than compiling them.
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_compilation_cache_max_size": 2**30,
}

# Before this version XLA prints two long lines for each program that it reads for a CPU, since it
# compares preferences of its own with the features of the machine.
QUIET_ON_CPU = (0, 12)
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")

# A program this old without the time of its last use is not being written any more.
ABANDONED = 60.0  # seconds


def keep_compiled() -> Path | None:
    """Makes JAX keep the programs of this process in a folder of the user; before it compiles.

    The folder is `rlhf-jax/xla` in `$XDG_CACHE_HOME`, or in `~/.cache`, and in it one for each
    number of cores. Where the user has set JAX's cache, nothing changes. Programs that cannot be
    read or written are compiled as if there were no folder.

    Returns:
      The folder; None if nothing is kept there.
    """
    decided = jax.config.jax_compilation_cache_dir is not None
    if decided or not jax.config.jax_enable_compilation_cache:
        return None
    if not _reads_quietly(jax.__version_info__, jax.config.jax_platforms):
        return None
    folder = _folder()
    if folder is None or not _is_ready(folder):
        return None
    # Of a full disk or a damaged file: only time is lost.
    about = "(Error (reading|writing) persistent compilation cache|Cache value for key)"
    warnings.filterwarnings("ignore", about)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder


def _reads_quietly(version: tuple[int, ...], platforms: str | None) -> bool:
    """Whether JAX reads programs without messages; without a query of the devices, too early."""
    if version >= QUIET_ON_CPU:
        return True
    installed = any(importlib.util.find_spec(name) is not None for name in ACCELERATORS)
    return installed and platforms != "cpu"


def _folder() -> Path | None:
    """The folder of the programs; None for a user without a home."""
    # A CPU's program is split into one part for each core, which JAX's key of the program ignores.
    inside = Path("rlhf-jax", "xla", f"{_cores()}-cores")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the standard says to ignore others
        return Path(base) / inside
    home = Path(os.path.expanduser("~"))
    return home / ".cache" / inside if home.is_dir() else None


def _cores() -> int:
    """The number of cores that this process may use, as XLA counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_ready(folder: Path) -> bool:
    """Whether the folder can be written; deletes programs that were written in part."""
    try:
        # Programs run as this user, so that nobody else may write them. With `parents=True` alone
        # the upper folders would have the default mode.
        for place in (folder.parents[1], folder.parent, folder):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
        if writable:
            _drop_unfinished(folder)
    except OSError:
        writable = False
    if not writable:
        logger.warning(
            "Compiled programs are not kept, for %s cannot be written; set "
            "JAX_COMPILATION_CACHE_DIR to another folder, or JAX_ENABLE_COMPILATION_CACHE=false.",
            folder,
        )
    return writable


def _drop_unfinished(folder: Path) -> None:
    """Deletes programs without a time of use, which is written last; JAX would not replace them."""
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if not used.exists() and time.time() - program.stat().st_mtime > ABANDONED:
                program.unlink()
