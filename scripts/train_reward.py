"""A reward model from pairs or rankings of responses; the same as `rlhf reward`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["reward", *sys.argv[1:]]))
