"""Judges a model on held-out rows.

Of texts: loss, perplexity and ROUGE. Of a reward model: accuracy, calibration and length bias on
pairs. Of a policy: scores and ROUGE of its responses, win rates over another policy by the score, a
gold score and a judge, and how good the best of n responses is.

python scripts/evaluate.py --config FILE.yaml --section.key value ...
"""

import sys

from rlhf_jax.runtime.commands import terminal as cli

if __name__ == "__main__":
    sys.exit(cli.main("run_evaluate", "EvaluateConfig"))
