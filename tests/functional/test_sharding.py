"""Eight devices equal one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_eight_devices_equal_one_with_auto_and_explicit_axes():
    done = subprocess.run(
        [sys.executable, "-m", "tests.functional.eight_devices"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["Auto equal", "Explicit equal", "shard_map equal"]
