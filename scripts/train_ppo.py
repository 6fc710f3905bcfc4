"""PPO against a reward model, with a KL penalty towards the policy it starts from.

python scripts/train_ppo.py --config FILE.yaml --section.key value ...
"""

import sys

from rlhf_jax.runtime.commands import terminal as cli

if __name__ == "__main__":
    sys.exit(cli.main("train_ppo", "PPOConfig"))
