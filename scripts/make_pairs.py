"""Preference pairs of a model's own responses; the same as `rlhf pairs sample`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["pairs", "sample", *sys.argv[1:]]))
