"""Preference optimization on pairs of responses; the same as `rlhf dpo`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))
