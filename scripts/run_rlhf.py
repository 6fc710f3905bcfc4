"""Supervised fine-tuning, a reward model and PPO in a row; the same as `rlhf run`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
