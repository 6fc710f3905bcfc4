"""What Ctrl-C and SIGTERM do while a stage runs."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

from rlhf_jax.parallel import hosts

Moment = Literal["nothing to lose", "to be finished", "to be made up for"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the state was saved; the message says how to continue."""

    raised_on_all_hosts = False  # see `parallel.hosts.is_raised_on_all_hosts`


class Terminated(Interrupted):
    """The same by SIGTERM."""


class CutShort(KeyboardInterrupt):
    """SIGTERM came during an evaluation; the state is still to be saved."""


class Signals:
    """Takes Ctrl-C and SIGTERM in its `with` block, in the main thread; elsewhere it does nothing.

    What they do depends on the moment. While there is "nothing to lose", as at the start and at the
    export of what is saved already, they end the run at once. A step or a save is "to be finished":
    they set `stopping`. An evaluation can be "made up for" later: Ctrl-C waits for it, but SIGTERM
    raises `CutShort`, for who sends it waits for seconds only.

    A second Ctrl-C ends the run at once; a second SIGTERM does nothing more. One of several
    processes finishes an evaluation and an export, in which the others are as well.

    Attributes:
      stopping: whether one of them came.
      terminated: whether SIGTERM did.
    """

    def __init__(self) -> None:
        self.stopping, self.terminated = False, False
        self._moment: Moment = "nothing to lose"
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # Signals reach the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def during(self, moment: Moment) -> Iterator[None]:
        """What goes on in the block."""
        before, self._moment = self._moment, moment
        try:
            if self.terminated:  # since anybody looked
                self._terminate()
            yield
        finally:
            self._moment = before

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            if not self.terminated:
                self.stopping = self.terminated = True
                self._terminate()
        elif self.stopping or self._moment == "nothing to lose":
            raise KeyboardInterrupt
        else:
            self.stopping = True
            _say(b"\nStopping after this step; once more to stop at once.\n")

    def _terminate(self) -> None:
        if self._moment == "nothing to lose" and not hosts.several():
            raise Terminated("Stopped by SIGTERM; run the same command again to continue.")
        if self._moment == "to be made up for" and not hosts.several():
            raise CutShort
        _say(b"\nSIGTERM: saving after this step.\n")


def _say(text: bytes) -> None:
    """Past Python's buffers, which the interrupted code may be in the midst of writing to."""
    with contextlib.suppress(OSError):
        os.write(2, text)
