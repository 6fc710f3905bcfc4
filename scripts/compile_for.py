"""Memory and time of a step on devices that are not there; the same as `rlhf compile-for`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["compile-for", *sys.argv[1:]]))
