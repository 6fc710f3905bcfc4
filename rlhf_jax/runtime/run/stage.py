"""The interface between the loop and a stage of training."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

Metrics = dict[str, float]
Samples = list[dict[str, Any]]


class StageResult(NamedTuple):
    """The result of a command.

    Attributes:
      run_dir: the run folder.
      metrics: the last value of each metric.
    """

    run_dir: str
    metrics: Metrics


class Stage(Protocol):
    """One stage of training, as the loop uses it."""

    name: str
    mesh: Mesh
    total_steps: int
    schedule: str  # of the learning rate
    losses: tuple[str, ...]  # metrics that must be finite in each step
    scores: Mapping[str, str]  # metrics that are mean scores of responses, and their labels
    fingerprints: dict[str, dict[str, Any]]  # see `run.folder.Fingerprints`
    flops_per_token: float  # of products with parameters, per real token of a step
    flops_per_step: float  # of products with parameters for other tokens of a step

    def init_state(self) -> Any:
        """The state before the first step."""
        ...

    def step(self, state: Any, index: int) -> tuple[Any, Mapping[str, jax.Array], Any]:
        """Step number `index` from 0: (state, metrics on the device, output).

        The output, which `observe` and `samples` read, is None where neither needs any.
        """
        ...

    def observe(self, output: Any) -> Metrics:
        """Metrics that are computed on the host from a step's output."""
        ...

    def evaluate(self, state: Any) -> Metrics:
        """Metrics on held-out examples, with names that begin with "eval/"."""
        ...

    def samples(self, state: Any, output: Any, count: int) -> Samples:
        """Entries of `samples.jsonl`, from the output of the last step or, where it is None, from
        the state; [] where they need an output.
        """
        ...

    def saved(self, state: Any) -> Any:
        """The part of a state that a checkpoint holds."""
        ...

    def resumed(self, state: Any, saved: Any) -> Any:
        """The state with this part replaced."""
        ...

    def finish(self, state: Any) -> os.PathLike[str] | None:
        """Writes `hf/` and, last of all, `report.html`; returns the path of the report, if any.

        Raises an InputError where the run folder cannot be written (`disk_errors`).
        """
        ...
