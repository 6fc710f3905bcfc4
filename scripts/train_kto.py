"""Optimization on responses that are desirable or not; the same as `rlhf kto`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["kto", *sys.argv[1:]]))
