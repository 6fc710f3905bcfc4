"""What a command compiles is kept on disk, so that the next one with the same programs reads it."""

import contextlib
import importlib.util
import logging
import os
import time
import warnings
from pathlib import Path

import jax

logger = logging.getLogger("rlhf_jax.runtime.commands.compilation_cache")

# JAX's settings, and what they are here where the environment says nothing of them.
SETTINGS = {
    # On two CPU cores most of what is compiled in less takes longer to write and to read.
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    # Beyond it those go that were not read for longest.
    "jax_compilation_cache_max_size": 2**30,
}

# Before this version XLA prints two long lines for each program that it reads for a CPU: it takes
# its own preferences, of which the machine knows nothing, for features that the machine lacks.
QUIET_ON_CPU = (0, 12)
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")

# A file this old without the time of its last use is not being written: its process has ended.
ABANDONED = 60.0  # seconds


def keep_compiled() -> Path | None:
    """Lets JAX keep what this process compiles in a folder of the user's, before it compiles.

    The folder is `rlhf-jax/xla` in `$XDG_CACHE_HOME`, or in `~/.cache`, and in it one for each
    number of cores. What the user has told JAX goes before: where JAX has a folder already, or
    keeps nothing, all is left as it is. Programs that cannot be read or written later on are
    compiled as if there were no folder.

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
    # Of a full disk, or of a file that is damaged: nothing is lost by it but time.
    about = "(Error (reading|writing) persistent compilation cache|Cache value for key)"
    warnings.filterwarnings("ignore", about)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder


def _reads_quietly(version: tuple[int, ...], platforms: str | None) -> bool:
    """Whether JAX says nothing when it reads a program; asks for no device, which is too early."""
    if version >= QUIET_ON_CPU:
        return True
    installed = any(importlib.util.find_spec(name) is not None for name in ACCELERATORS)
    return installed and platforms != "cpu"


def _folder() -> Path | None:
    """Where programs are kept; None for a user without a home."""
    # A program for a CPU is split into as many parts as there were cores when it was compiled. JAX
    # tells machines apart by what their cores can do, but not by how many there are.
    inside = Path("rlhf-jax", "xla", f"{_cores()}-cores")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # others are to be ignored, says the standard that the name is from
        return Path(base) / inside
    home = Path(os.path.expanduser("~"))
    return home / ".cache" / inside if home.is_dir() else None


def _cores() -> int:
    """How many cores this process may use, counted as XLA does."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_ready(folder: Path) -> bool:
    """Whether the folder is there and can be written; frees it of what was written in part."""
    try:
        # Its programs run as this user: no other one may put any there. `parents` would make those
        # that are ours with the mode of any new folder.
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
    """Deletes programs of which only a part was written: JAX would not write them again.

    The time of its use is written beside a program after it, so that one without it is not whole.
    """
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if not used.exists() and time.time() - program.stat().st_mtime > ABANDONED:
                program.unlink()
