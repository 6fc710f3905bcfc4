"""The settings of `scripts/benchmark.py`."""

import dataclasses
import difflib
from typing import Literal

from rlhf_jax.errors import InputError
from scripts.benchmark.workloads import GPU_WORKLOADS, WORKLOADS, Workload

NAMES = tuple(workload.name for workload in (*WORKLOADS, *GPU_WORKLOADS))


class BenchmarkError(RuntimeError):
    """What ends the command without a table: a wrong number, or a side that did not answer."""


@dataclasses.dataclass(frozen=True)
class PeerSettings:
    """The section `peer`: what is measured beside us.

    Attributes:
      name: "trl", or "none" to measure us alone, for which `--peer none` is short.
      python: the interpreter to make the virtual environment with; null takes the running one.
      venv: the folder of that environment, which is made if it is missing; `--peer none` needs
        none.
      dtype: what the peer computes in; "bfloat16" is its mixed precision (`bf16`).
    """

    name: Literal["trl", "none"] = "trl"
    python: str | None = None
    venv: str = ".venv-bench"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """All settings of `benchmark.py`.

    Attributes:
      workloads: names of those to measure; empty measures all, those for a GPU on one alone.
      rounds: how often each side takes its turn, after the warm-up.
      warmup: steps of each side that do not count; ours compiles in the first.
      dtype: "bfloat16" measures us in bfloat16 too, beside float32.
      check: compares our losses, gradients and samples with the plain path first, on small models.
      json: a file for all numbers, written after each workload; null writes none.
    """

    workloads: tuple[str, ...] = ()
    rounds: int = 5
    warmup: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    check: bool = True
    peer: PeerSettings = PeerSettings()
    json: str | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "warmup"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        for name in self.workloads:
            if name not in NAMES:
                near = difflib.get_close_matches(name, NAMES, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise InputError(f"Unknown workload {name!r}{hint}; there are {', '.join(NAMES)}.")

    def chosen(self, platform: str) -> tuple[Workload, ...]:
        """The workloads to be measured on "cpu", "gpu" or "tpu", in the order of the table.

        Raises:
          InputError: one that needs a GPU is named elsewhere.
        """
        if platform == "gpu":
            known = (*WORKLOADS, *GPU_WORKLOADS)
        else:
            known = WORKLOADS
            for_gpu = [each.name for each in GPU_WORKLOADS if each.name in self.workloads]
            if for_gpu:
                raise InputError(
                    f"The workload {for_gpu[0]} needs an NVIDIA GPU, but JAX runs on {platform}; "
                    "install jax for CUDA, or leave it out."
                )
        return tuple(each for each in known if each.name in (self.workloads or NAMES))
