"""Measures steps of this library and of TRL in turn: time, memory, and the share of the peak.

python scripts/benchmark.py --workloads '[sft_mid, generate_mid]' --rounds 5 --json FILE
"""

import sys
from pathlib import Path

# The modules are scripts.benchmark.*, also when this file is run from another folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
