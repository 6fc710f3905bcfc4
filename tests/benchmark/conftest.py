"""A tiny workload, and a peer that answers at once."""

import sys

import pytest

from scripts.benchmark.sides import SideCommand
from scripts.benchmark.workloads import Workload

# Follows the protocol of trl_worker.py; logs its name and each line that it reads.
PEER = """
import json, sys
request = json.load(open(sys.argv[3]))
log = open(sys.argv[2], "a", buffering=1)
def send(**answer): print(json.dumps(answer), flush=True)
print("warming up", file=sys.stderr)
if request["dtype"] == "bfloat16":
    sys.exit("RuntimeError: this peer has no bfloat16")
send(ready=True, versions={"trl": "0.0", "numpy": "0.1"})
for line in sys.stdin:
    log.write(f"{sys.argv[1]} {line}")
    if line == "step\\n":
        send(seconds=2.0)
    if line == "stop\\n":
        send(peak_bytes=2**30, peak_of="steps")
        break
"""


@pytest.fixture
def tiny():
    """Supervised fine-tuning of one layer."""
    return Workload("sft_tiny", "sft", 1, 8, 2, 2, 3, 2, vocab_size=16, n_positions=8, to_reach=1.5)


@pytest.fixture
def peer(tmp_path):
    """The command of a peer, by name and dtype; all requests are in `tmp_path / "log"`."""
    program = tmp_path / "peer.py"
    program.write_text(PEER)

    def command(name="trl", dtype="float32"):
        return SideCommand(
            name, [sys.executable, "-S", str(program), name, str(tmp_path / "log")], dtype, {}
        )

    return command
