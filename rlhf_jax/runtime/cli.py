"""What the scripts share: reading the command line, and putting errors into one line."""

import os
import sys

INPUT_ERROR, DIVERGED, INTERRUPTED = 2, 1, 130


def main(command: str, kind: str) -> int:
    """Runs a command with the configuration of the command line.

    Args:
      command: a function of `rlhf_jax.runtime`, by name, that takes the configuration.
      kind: the class in `runtime/config.py` that describes it, by name.

    Returns:
      The exit status: 0, 2 for what the user can mend, 1 for a diverged run, 130 when interrupted.
      Each but the first comes with one sentence on standard error.
    """
    # transformers says at its import that PyTorch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from rlhf_jax import runtime
    from rlhf_jax.errors import InputError
    from rlhf_jax.runtime import config, loop

    try:
        getattr(runtime, command)(config.parse(getattr(config, kind)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    except loop.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "Interrupted; nothing was running yet.", file=sys.stderr)
        return INTERRUPTED
    return 0
