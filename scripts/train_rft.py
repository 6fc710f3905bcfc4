"""Rejection sampling; the same as `rlhf rft`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["rft", *sys.argv[1:]]))
