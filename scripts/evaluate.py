"""Loss of a model, accuracy of a reward model, or scores of a policy on held-out rows.

python scripts/evaluate.py --config FILE.yaml --section.key value ...
"""

import sys

from rlhf_jax.runtime import cli

if __name__ == "__main__":
    sys.exit(cli.main("run_evaluate", "EvaluateConfig"))
