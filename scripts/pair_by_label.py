"""Preference pairs from labelled texts: each text of one label is preferred to one of the other.

python scripts/pair_by_label.py train.jsonl.gz pairs.jsonl --preferred 1 --other 0
"""

import sys

from rlhf_jax.runtime.commands import pairs

if __name__ == "__main__":
    sys.exit(pairs.main(sys.argv[1:], "pair_by_label.py", "by-label"))
