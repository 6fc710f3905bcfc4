"""Supervised fine-tuning on texts, or on completions of prompts.

python scripts/train_sft.py --config FILE.yaml --section.key value ...
"""

import sys

from rlhf_jax.runtime.commands import terminal as cli

if __name__ == "__main__":
    sys.exit(cli.main("train_sft", "SFTConfig"))
