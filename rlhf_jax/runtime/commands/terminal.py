"""What the scripts share: reading the command line, and putting errors into one line."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

INPUT_ERROR, DIVERGED, FAILED, INTERRUPTED = 2, 1, 1, 130


def main(command: str, kind: str) -> int:
    """Runs a command with the configuration of the command line; the exit status is that of `run`.

    Args:
      command: a function of `rlhf_jax.runtime`, by name, that takes the configuration.
      kind: the class in `runtime/config.py` that describes it, by name.
    """

    def work():
        from rlhf_jax import runtime
        from rlhf_jax.runtime import config
        from rlhf_jax.runtime.commands.compilation_cache import keep_compiled

        settings = config.parse(getattr(config, kind))
        keep_compiled()  # --help and wrong settings, which end before, need no folder
        getattr(runtime, command)(settings)

    # What other commands leave at SIGTERM is no whole output.
    trains = command.startswith(("train_", "run_rlhf"))
    return _until_terminated(work) if trains else run(work)


def _until_terminated(work: Callable[[], object]) -> int:
    """`run`, but 0 as well when SIGTERM came: nothing is lost that a run has done."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return run(work)
    except _TerminatedHere as terminated:
        from rlhf_jax.parallel import hosts

        hosts.leave(terminated, 0)
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


class _TerminatedHere(BaseException):
    """SIGTERM came while no stage was there to take it: at the imports, or between stages."""


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedHere


def run(work: Callable[[], object]) -> int:
    """Runs the work of a command, which may import the package: only here it is prepared for that.

    Returns:
      The exit status: 0, 2 for what the user can mend, 1 for a diverged run, 130 when interrupted;
      and 0 when training was terminated by SIGTERM, which loses nothing. Each but the first comes
      with one sentence on standard error.
    """
    # transformers says at its import that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # huggingface_hub tells of each of its many attempts to reach the hub.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from rlhf_jax.errors import InputError
    from rlhf_jax.parallel import hosts
    from rlhf_jax.runtime.run import loop
    from rlhf_jax.runtime.run.signals import Terminated

    _set_up_logging()
    # Functions that settings name are looked for where the command was called, too.
    sys.path.append(os.getcwd())

    try:
        work()
        sys.stdout.flush()  # here, where an error can be told
    except InputError as error:
        return _ended(error, f"error: {error}", INPUT_ERROR)
    except loop.DivergedError as error:
        return _ended(error, f"error: {error}", DIVERGED)
    except Terminated as terminated:
        return _ended(terminated, str(terminated), 0)
    except KeyboardInterrupt as interrupt:
        default = "Interrupted; the same command continues from the last checkpoint, if any."
        return _ended(interrupt, str(interrupt) or default, INTERRUPTED)
    except BrokenPipeError:  # who read our output, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not hosts.several():
            raise
        return _ended(error, traceback.format_exc().rstrip(), FAILED)
    return 0


def _ended(error: BaseException, text: str, status: int) -> int:
    """The status, after the text was printed: by the first host alone where all know it."""
    from rlhf_jax.parallel import hosts

    if hosts.is_first() or not hosts.is_raised_on_all_hosts(error):
        print(text, file=sys.stderr)
    hosts.leave(error, status)
    return status


def _set_up_logging() -> None:
    """Our warnings as plain lines on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logger = logging.getLogger("rlhf_jax")
    logger.handlers, logger.propagate = [handler], False
    # Orbax logs there the traceback of what it raises as well, say a full disk.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
