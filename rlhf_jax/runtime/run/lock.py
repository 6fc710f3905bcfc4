"""The lock of a run folder, which one process has at a time."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.run.folder import disk_errors, is_remote, make_run_dir


class Lock:
    """The file `lock` in a run folder, locked by the kernel: the end of a process releases it.

    It names the process: host, process id and time. An address in an object store has no lock.
    """

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._path = pathlib.Path(run_dir) / "lock"
        self._file: int | None = None

    def acquire(self) -> None:
        """Makes and locks the folder; an InputError names another process that has the lock."""
        make_run_dir(self._run_dir)
        with disk_errors(self._run_dir):
            while self._file is None and not is_remote(self._run_dir):
                self._file = self._try()

    def _try(self) -> int | None:
        """The open file, locked; None after the removal of a lock that nobody holds."""
        file, holder = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # On file systems without locks the process that the file names is the holder.
            if (named := _holder(file)) or error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = named
        is_there = self._is_there(file)
        if holder is None and is_there:
            named = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}
            try:
                os.truncate(file, 0)
                os.pwrite(file, json.dumps(named).encode(), 0)
            except OSError:
                os.close(file)
                raise
            return file
        if holder is not None and _is_alive(holder):
            os.close(file)
            raise InputError(
                f"Another process writes the run folder {self._run_dir}: process "
                f"{holder.get('pid', 'unknown')} on {holder.get('host', 'unknown')}, since "
                f"{holder.get('since', 'unknown')}; wait for its end, or choose another --run_dir; "
                f"if it has ended, delete {self._path}."
            )
        if self._is_there(file):  # of a dead process, whose children may have it open
            self._path.unlink(missing_ok=True)
        os.close(file)
        return None

    def _is_there(self, file: int) -> bool:
        """Whether the path is still that of the open file."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises an InputError if the run folder was removed, renamed or replaced."""
        if self._file is not None and not self._is_there(self._file):
            raise InputError(
                f"The run folder {self._run_dir} was removed, renamed or replaced while the run "
                "wrote it; the run is not finished. Put the folder back and run the same command "
                "again, or start anew."
            ) from FileNotFoundError(self._run_dir)

    def release(self) -> None:
        """Removes the file, and with it the lock."""
        if self._file is not None:
            if self._is_there(self._file):
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


@contextlib.contextmanager
def locked(run_dir: str) -> Iterator[Lock]:
    """Makes a run folder and holds its lock in the block; with several hosts the first one does.

    Raises an InputError if the folder cannot be written, or another process has the lock.
    """
    lock = Lock(run_dir)
    hosts.from_first(lock.acquire)
    try:
        yield lock
    finally:
        lock.release()


def _holder(file: int) -> dict[str, Any]:
    """The process that a lock names; {} if it names none for half a second."""
    for _ in range(10):
        with contextlib.suppress(ValueError, TypeError):
            return dict(json.loads(os.pread(file, 1000, 0)))
        time.sleep(0.05)
    return {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether a process may exist; on another host it may."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is another user's
    return True
