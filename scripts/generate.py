"""Responses to prompts, one JSON object per line.

python scripts/generate.py --config FILE.yaml --section.key value ...
"""

import sys

from rlhf_jax.runtime.commands import terminal as cli

if __name__ == "__main__":
    sys.exit(cli.main("run_generate", "GenerateConfig"))
