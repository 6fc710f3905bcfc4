"""PPO against reward models or Python functions, with a KL penalty; the same as `rlhf ppo`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["ppo", *sys.argv[1:]]))
