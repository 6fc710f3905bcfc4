"""Preference pairs from prompts with completions: each is preferred to that of another prompt.

python scripts/pair_by_prompt.py train.jsonl.gz pairs.jsonl
"""

import sys

from rlhf_jax.runtime.commands import pairs

if __name__ == "__main__":
    sys.exit(pairs.main(sys.argv[1:], "pair_by_prompt.py", "by-prompt"))
