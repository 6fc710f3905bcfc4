"""Help, configuration, and errors in one line with an exit status, for all commands."""

import io
import logging
import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

CONTINUES = "the same command continues from the last checkpoint, if any."
INPUT_ERROR, DIVERGED, FAILED, INTERRUPTED, BROKEN_PIPE = 2, 1, 1, 130, 141


def run_command(
    name: str,
    kind: type,
    work: Callable[[Any], object],
    argv: Sequence[str],
    *,
    first: Sequence[str] = (),
    trains: bool = False,
) -> int:
    """Runs a command with the configuration of its flags; the exit status is that of `run`.

    Args:
      name: such as "rlhf ppo", for the help.
      kind: the configuration.
      work: called with the configuration.
      argv: the flags.
      first: settings that the help lists first.
      trains: whether the status after SIGTERM is 0, since a run continues from its checkpoint.
    """
    if "-h" in argv or "--help" in argv:
        from rlhf_jax.runtime.help import help_text

        sys.stdout.write(help_text(kind, name, first))
        return 0

    def configured():
        from rlhf_jax.runtime import config

        settings: Any = config.parse(kind, argv)
        from rlhf_jax.runtime.commands.compilation_cache import keep_compiled
        from rlhf_jax.runtime.run import folder, signals

        folder.COMMAND.set(shlex.join([*name.split(), *argv]))
        keep_compiled()
        try:
            work(settings)
        except SystemExit as exit:
            raise signals.exit_error(exit) from exit

    return _until_terminated(configured) if trains else run(configured)


def _until_terminated(work: Callable[[], object]) -> int:
    """`run`, with status 0 at SIGTERM: the run continues from its checkpoint."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return run(work, trains=True)
    except _TerminatedHere as terminated:
        from rlhf_jax.parallel import hosts

        hosts.leave(terminated, 0)
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


class _TerminatedHere(BaseException):
    """SIGTERM outside of a stage: during imports, or between stages."""


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedHere


def run(work: Callable[[], object], *, trains: bool = False) -> int:
    """Runs the work of a command; errors become one sentence on standard error.

    Before it stands the traceback of a function of the user that raised something.

    Returns:
      The exit status: 0 on success and when training was terminated by SIGTERM, 2 for an
      `InputError`, 1 for a diverged run, 130 after Ctrl-C. Where the reader of the output has
      closed it, such as `head`: 141 if the command trains, else 0.
    """
    # transformers warns of PyTorch, which is not needed, and huggingface_hub of each attempt.
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from rlhf_jax.errors import InputError
    from rlhf_jax.parallel import hosts
    from rlhf_jax.runtime.run import loop
    from rlhf_jax.runtime.run.signals import Terminated

    _set_up_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tables have dashes that ASCII lacks
    sys.path.append(os.getcwd())  # for functions that settings name
    try:
        work()
        _flush()  # an error is still reported here
    except InputError as error:
        return _ended(error, f"{_lines_of_function(error)}error: {error}", INPUT_ERROR)
    except loop.DivergedError as error:
        return _ended(error, f"error: {error}", DIVERGED)
    except Terminated as terminated:
        return _ended(terminated, str(terminated), 0)
    except KeyboardInterrupt as interrupt:
        default = f"Interrupted; {CONTINUES}"
        return _ended(interrupt, str(interrupt) or default, INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _silence_closed_output():
            text = "error: The output was closed before the run was finished; " + CONTINUES
            return _ended(error, text, BROKEN_PIPE) if trains else 0
        if not hosts.several():
            raise
        return _ended(error, traceback.format_exc().rstrip(), FAILED)
    return 0


def _lines_of_function(error: Exception) -> str:
    """The traceback of a function of the user that raised something; "" for other errors."""
    from rlhf_jax.errors import FunctionError

    has_cause = isinstance(error, FunctionError) and error.__cause__ is not None
    return "".join(traceback.format_exception(error.__cause__)) if has_cause else ""


def _flush() -> None:
    if sys.stdout is not None:  # it is None where the command began without one
        sys.stdout.flush()


def _silence_closed_output() -> bool:
    """Whether a pipe of the output is closed; what is written to it later is dropped."""
    closed = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            closed = True
    return closed


def _ended(error: BaseException, text: str, status: int) -> int:
    """The status, after printing the text: on the first host alone if all have the error."""
    from rlhf_jax.parallel import hosts

    if hosts.is_first() or not hosts.is_raised_on_all_hosts(error):
        print(text, file=sys.stderr)
    hosts.leave(error, status)
    return status


def _set_up_logging() -> None:
    """Warnings of this package as plain lines on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logger = logging.getLogger("rlhf_jax")
    logger.handlers, logger.propagate = [handler], False
    # Orbax also logs the traceback of each exception that it raises.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable


def _unraisable(raised: Any) -> None:
    """Without the writes that Orbax gives up at the first error, of a full disk say."""
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)
