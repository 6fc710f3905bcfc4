"""A pool of processes that call a reward function, each call within a time limit."""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing import Pipe, connection
from typing import Any, NamedTuple

from rlhf_jax.errors import FunctionError, InputError
from rlhf_jax.runtime.rewards.worker import Call, Reply

_logger = logging.getLogger(__name__)

_SERVE = """
import json, sys
from rlhf_jax.runtime.rewards.worker import serve
serve(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
"""


class Scored(NamedTuple):
    """The scores of some calls.

    Attributes:
      scores: a number each, NaN where none counts; the failed score where a call failed.
      failed: whether each call failed.
    """

    scores: list[float]
    failed: list[bool]


class _Worker:
    """A process and this end of its connection."""

    def __init__(self, name: str, kwargs: dict[str, Any]) -> None:
        self.connection, other = Pipe()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # Not by `multiprocessing`, which runs the main module again. A session of its own: neither
        # Ctrl-C reaches it, nor does a process that the function starts outlive it.
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(other.fileno()), name, json.dumps(kwargs)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[other.fileno()],
                start_new_session=True,
                # A function that imports jax must not take the accelerator of the run.
                env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
            )
        self.index: int | None = None  # of the call that it works on
        self.is_ready = False
        self.deadline = math.inf

    def begin(self, index: int, call: Call, timeout: float | None) -> None:
        self.index = index
        if self.is_ready:
            self._set_deadline(timeout)
        with contextlib.suppress(OSError):  # it has ended, which `receive` finds
            self.connection.send(call)

    def receive(self, timeout: float | None) -> Reply | None:
        """A reply to the call; None after the word that the function is imported."""
        try:
            reply = self.connection.recv()
        except (EOFError, OSError):
            status = self.process.wait()
            if not self.is_ready:
                return Reply("refused", f"its process ends by status {status} while it is imported")
            return Reply("lost", f"its process ended by status {status}")
        if reply.kind == "ready":
            self.is_ready = True
            self._set_deadline(timeout)
            return None
        self.deadline = math.inf
        return reply

    def _set_deadline(self, timeout: float | None) -> None:
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout

    def end(self) -> None:
        """Ends the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class FunctionPool:
    """Processes that call a function for one response at a time.

    They start with the first call, stay for the next ones, and end with this object, or with the
    program. A call that raises, gives NaN, exceeds the time limit or ends its process has the
    failed score, and the process is replaced where needed; all other calls have their own scores.

    Args:
      name: "module:function".
      kwargs: further arguments of each call, of JSON.
      num_processes: the calls at a time.
      timeout: the seconds of a call, from the start of the process not counted; None: no limit.
      failed_score: the score of a response whose call failed.
    """

    def __init__(
        self,
        name: str,
        kwargs: dict[str, Any],
        *,
        num_processes: int,
        timeout: float | None = None,
        failed_score: float = 0.0,
    ) -> None:
        self.name, self.kwargs, self.num_processes = name, kwargs, num_processes
        self.timeout, self.failed_score = timeout, failed_score
        self._workers: list[_Worker] = []
        self._has_warned = False
        self.close = weakref.finalize(self, _end_all, self._workers)

    def __call__(self, calls: Sequence[Call]) -> Scored:
        """The score of each call, in order.

        Raises:
          InputError: the function is no reward: it gives something other than one number for one
            response.
          FunctionError: each call of several failed.
        """
        replies: list[Reply | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        try:
            while waiting or any(worker.index is not None for worker in self._workers):
                self._hand_out(calls, waiting)
                for worker in self._finished():
                    self._store_reply(worker, replies)
        except BaseException:
            _end_all(self._workers)  # which may be at work on a call that nobody waits for
            raise
        return self._scored([reply for reply in replies if reply is not None])

    def _hand_out(self, calls: Sequence[Call], waiting: deque[int]) -> None:
        while waiting:
            idle = [worker for worker in self._workers if worker.index is None]
            if not idle and len(self._workers) == self.num_processes:
                return
            if not idle:
                idle = [_Worker(self.name, self.kwargs)]
                self._workers += idle
            index = waiting.popleft()
            idle[0].begin(index, calls[index], self.timeout)

    def _finished(self) -> list[_Worker]:
        """The workers that have replied or exceeded their time, after waiting for one of them."""
        busy = [worker for worker in self._workers if worker.index is not None]
        rest = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        connections = [worker.connection for worker in busy]
        ready = connection.wait(connections, None if math.isinf(rest) else rest)
        now = time.monotonic()
        return [each for each in busy if each.connection in ready or each.deadline <= now]

    def _store_reply(self, worker: _Worker, replies: list[Reply | None]) -> None:
        assert worker.index is not None
        if worker.connection.poll():
            reply = worker.receive(self.timeout)
        else:
            reply = Reply("lost", f"it took more than {self.timeout:g} seconds")
        if reply is None:
            return
        if reply.kind == "refused":
            raise InputError(f"{self.name}: {reply.value}")
        replies[worker.index], worker.index = reply, None
        if worker.deadline < math.inf or worker.process.poll() is not None:
            worker.end()
            self._workers.remove(worker)

    def _scored(self, replies: list[Reply]) -> Scored:
        failed = [reply.kind in ("raised", "lost") for reply in replies]
        if any(failed):
            first = replies[failed.index(True)].value
            if len(replies) > 1 and all(failed):  # nothing could be learned from equal scores
                raise FunctionError(
                    f"{self.name} failed for each of {len(failed)} responses: {first}"
                )
            if not self._has_warned:  # later ones are counted in a metric alone
                text = "%s failed for %d of %d responses, which have the score %g: %s"
                numbers = (sum(failed), len(failed), self.failed_score)
                _logger.warning(text, self.name, *numbers, first)
            self._has_warned = True
        values = (
            self.failed_score if fails else float(reply.value)
            for reply, fails in zip(replies, failed, strict=True)
        )
        return Scored([*values], failed)


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
