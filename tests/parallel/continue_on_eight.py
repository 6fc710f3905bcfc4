"""Continues a run of one device on eight, by two steps: `-m` with its folder."""

import os
import signal
import sys

if __name__ == "__main__":  # and not when it is looked through for doctests
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

from rlhf_jax.runtime import train_sft  # noqa: E402
from rlhf_jax.runtime.run.signals import Interrupted  # noqa: E402
from rlhf_jax.runtime.stages import offline  # noqa: E402
from tests.parallel.test_checkpoints import config  # noqa: E402


class StoppingStage(offline.PolicyStage):
    """Presses Ctrl-C in the second step, and prints the share of the state on a device."""

    def resumed(self, state, saved):
        arrays = jax.tree.leaves(saved["params"])
        total = sum(array.size for array in arrays)
        here = sum(array.addressable_shards[0].data.size for array in arrays)
        sys.stdout.write(f"share {here / total}\n")
        return super().resumed(state, saved)

    def step(self, state, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(state, index)


if __name__ == "__main__":
    offline.PolicyStage = StoppingStage
    try:
        train_sft(config(sys.argv[1], {"data": 2, "fsdp": 2, "tensor": 2}))
    except Interrupted as interrupted:
        sys.stdout.write(f"{interrupted}\n")
