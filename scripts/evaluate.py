"""Evaluation of texts, pairs or responses; the same as `rlhf evaluate`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
