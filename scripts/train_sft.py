"""Supervised fine-tuning on texts, or on prompts with completions; the same as `rlhf sft`."""

import sys

from rlhf_jax.runtime.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
