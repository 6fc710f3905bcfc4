"""What the scripts share: reading the command line, and putting errors into one line."""

import logging
import os
import signal
import sys
from types import FrameType

INPUT_ERROR, DIVERGED, INTERRUPTED = 2, 1, 130


def main(command: str, kind: str) -> int:
    """Runs a command with the configuration of the command line.

    Args:
      command: a function of `rlhf_jax.runtime`, by name, that takes the configuration.
      kind: the class in `runtime/config.py` that describes it, by name.

    Returns:
      The exit status: 0, 2 for what the user can mend, 1 for a diverged run, 130 when interrupted;
      and 0 when training was terminated by SIGTERM, which loses nothing. Each but the first comes
      with one sentence on standard error.
    """
    if not command.startswith("run_rlhf") and not command.startswith("train_"):
        return _main(command, kind)  # what they leave at SIGTERM is no whole output
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _main(command, kind)
    except _TerminatedHere:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


class _TerminatedHere(BaseException):
    """SIGTERM came while no stage was there to take it: at the imports, or between stages."""


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedHere


def _main(command: str, kind: str) -> int:
    # transformers says at its import that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # huggingface_hub tells of each of its many attempts to reach the hub.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    from rlhf_jax import runtime
    from rlhf_jax.errors import InputError
    from rlhf_jax.runtime import config, loop
    from rlhf_jax.runtime.signals import Terminated

    _set_up_logging()
    # Functions that settings name are looked for where the command was called, too.
    sys.path.append(os.getcwd())

    try:
        getattr(runtime, command)(config.parse(getattr(config, kind)))
        sys.stdout.flush()  # here, where an error can be told
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    except loop.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    except Terminated as terminated:
        print(terminated, file=sys.stderr)
        return 0
    except KeyboardInterrupt as interrupt:
        default = "Interrupted; the same command continues from the last checkpoint, if any."
        print(str(interrupt) or default, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read our output, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _set_up_logging() -> None:
    """Our warnings as plain lines on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    logger = logging.getLogger("rlhf_jax")
    logger.handlers, logger.propagate = [handler], False
    # Orbax logs there the traceback of what it raises as well, say a full disk.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
