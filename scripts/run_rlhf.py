"""Supervised fine-tuning, reward model and PPO in one run.

python scripts/run_rlhf.py --config FILE.yaml --section.key value ...
"""

import sys

from rlhf_jax.runtime.commands import terminal as cli

if __name__ == "__main__":
    sys.exit(cli.main("run_rlhf", "RLHFConfig"))
