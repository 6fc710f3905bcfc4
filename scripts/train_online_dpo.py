"""Preference optimization on sampled responses; the same as `rlhf online-dpo`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["online-dpo", *sys.argv[1:]]))
