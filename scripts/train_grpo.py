"""Policy gradients on groups of responses; the same as `rlhf grpo`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["grpo", *sys.argv[1:]]))
