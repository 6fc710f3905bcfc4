"""The settings of `scripts/benchmark.py`."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from typing import Literal

from rlhf_jax.errors import InputError
from scripts.benchmark.workloads import GPU_WORKLOADS, WORKLOADS, Workload, with_weights

NAMES = tuple(workload.name for workload in (*WORKLOADS, *GPU_WORKLOADS))


class BenchmarkError(RuntimeError):
    """Ends the command without a table: a check failed, or a measured process did not answer."""


@dataclasses.dataclass(frozen=True)
class PeerSettings:
    """The section `peer`: the library that is measured beside this one.

    Attributes:
      name: "trl", or "none" to measure this library alone; `--peer none` is short for it.
      python: the interpreter that makes the virtual environment; null takes the running one.
      venv: the folder of that environment, which is made if it is missing; not used with
        `--peer none`.
      dtype: the compute dtype of the peer; "bfloat16" is its mixed precision (`bf16`).
    """

    name: Literal["trl", "none"] = "trl"
    python: str | None = None
    venv: str = ".venv-bench"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Steps of this library beside those of TRL.

    Attributes:
      workloads: names of the workloads; empty measures all, those for a GPU only on a GPU.
      rounds: measured steps of each side, after the warm-up; where sides alternate, each follows
        one that does not count.
      warmup: steps of each side before the measured ones; this library compiles before the first.
      dtype: "bfloat16" measures this library in bfloat16 too, beside float32.
      check: first compares losses, gradients and samples with the plain path, on small models.
      model_path: a folder with the weights of SmolLM2-135M, for both sides of the workloads that
        end in smollm2; null gives them random weights of the same sizes.
      json: a file for all numbers, written after each workload; null writes none.
    """

    workloads: tuple[str, ...] = ()
    rounds: int = 5
    warmup: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    check: bool = True
    peer: PeerSettings = PeerSettings()
    model_path: str | None = None
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
        """The workloads to measure on "cpu", "gpu" or "tpu", in the order of the table.

        Raises:
          InputError: a workload that needs a GPU is named on another platform.
        """
        available = (*WORKLOADS, *GPU_WORKLOADS) if platform == "gpu" else WORKLOADS
        for each in GPU_WORKLOADS:
            if each.name in self.workloads and each not in available:
                raise InputError(
                    f"The workload {each.name} needs an NVIDIA GPU, but JAX runs on {platform}; "
                    "install jax for CUDA, or leave it out."
                )
        chosen = (each for each in available if each.name in (self.workloads or NAMES))
        return tuple(with_weights(each, self.model_path) for each in chosen)


def expand_peer_flag(argv: Sequence[str]) -> list[str]:
    """Replaces `--peer NAME` by `--peer.name NAME`; a file or a mapping of the section is kept.

    >>> expand_peer_flag(["--peer", "none", "--peer=trl"])
    ['--peer.name', 'none', '--peer.name=trl']
    """
    expanded = []
    for flag, following in zip(argv, [*argv[1:], "--"], strict=False):
        name, _, value = flag.partition("=")
        value = value or following
        is_short = name == "--peer" and not value.startswith(("-", "{"))
        is_short = is_short and not os.path.isfile(value)
        expanded.append(flag.replace("--peer", "--peer.name", 1) if is_short else flag)
    return expanded
