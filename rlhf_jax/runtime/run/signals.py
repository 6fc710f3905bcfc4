"""The effect of Ctrl-C and SIGTERM on a run."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts

Phase = Literal["interruptible", "step", "evaluation"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the state was saved; the message says how to continue."""

    raised_on_all_hosts = False  # see `parallel.hosts.is_raised_on_all_hosts`


class Terminated(Interrupted):
    """The same by SIGTERM."""


class EvaluationTerminated(KeyboardInterrupt):
    """SIGTERM during an evaluation; the state is still to be saved."""


class Signals:
    """Handles Ctrl-C and SIGTERM in its `with` block, in the main thread; elsewhere does nothing.

    The effect depends on the phase:

    - "interruptible", at the start and while a saved state is exported: the run ends at once.
    - "step", which includes a save: `stopping` is set, and the run ends after the step.
    - "evaluation": Ctrl-C sets `stopping`. SIGTERM raises `EvaluationTerminated`, as its sender
      waits for seconds only, and an evaluation can be repeated.

    A second Ctrl-C ends the run at once; a second SIGTERM has no effect. With several processes
    evaluations and exports are completed, as the other processes take part in them.

    Attributes:
      stopping: whether Ctrl-C or SIGTERM was received.
      terminated: whether SIGTERM was received.
    """

    def __init__(self) -> None:
        self.stopping, self.terminated = False, False
        self._phase: Phase = "interruptible"
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # which alone receives signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Sets the phase of the block; raises at its start if an earlier SIGTERM ends it."""
        previous, self._phase = self._phase, phase
        try:
            if self.terminated:
                self._terminate()
            yield
        finally:
            self._phase = previous

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            if not self.terminated:
                self.stopping = self.terminated = True
                self._terminate()
        elif self.stopping or self._phase == "interruptible":
            raise KeyboardInterrupt
        else:
            self.stopping = True
            _print(b"\nStopping after this step; once more to stop at once.\n")

    def _terminate(self) -> None:
        if self._phase == "interruptible" and not hosts.several():
            raise Terminated("Stopped by SIGTERM; run the same command again to continue.")
        if self._phase == "evaluation" and not hosts.several():
            raise EvaluationTerminated
        _print(b"\nSIGTERM: saving after this step.\n")


def exit_error(exit: SystemExit) -> InputError:
    """The error of a run in which a user's function or module ended the process."""
    return InputError(
        f"A function or a module that the settings name called sys.exit({exit.code!r}), which ends "
        "the command before its work is done; let it raise an error, or return."
    )


def _print(text: bytes) -> None:
    """Writes without Python's buffers, as the interrupted code may be writing to them."""
    with contextlib.suppress(OSError):
        os.write(2, text)
