"""RLOO; the same as `rlhf rloo`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["rloo", *sys.argv[1:]]))
