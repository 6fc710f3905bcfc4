"""Transfers between devices and hosts in two processes, and then in one and in four.

The long version of tests/parallel/test_several_processes.py: held-out examples, ROUGE, normalized
reward models that go on from a checkpoint, rejection sampling in four processes, texts mixed into
PPO, and all evaluations and samples. Called from the root of the repository, with an empty folder:

    JAX_PLATFORMS=cpu python -m tools.compare_processes FOLDER
"""

import argparse
from pathlib import Path

from tests.parallel.several_processes import TRAIN
from tests.parallel.test_several_processes import (
    assert_same_metrics,
    assert_same_samples,
    train_and_continue,
)


def main(folder: str) -> None:
    """Makes the runs, and compares all metrics and samples with those of one process."""
    base = Path(folder).resolve()
    base.mkdir(parents=True)
    train_and_continue(base, "full")
    for name in ("alone", "four"):
        for stage in TRAIN:
            assert_same_metrics(base, name, stage)
            assert_same_samples(base, name, stage)
            print(f"{name} {stage}: as in one process")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", help="where the runs are kept; made anew")
    main(parser.parse_args().folder)
