"""A reward model from pairs of responses, of which one was preferred.

python scripts/train_reward.py --config FILE.yaml --section.key value ...
"""

import sys

from rlhf_jax.runtime.commands import terminal as cli

if __name__ == "__main__":
    sys.exit(cli.main("train_reward", "RewardConfig"))
