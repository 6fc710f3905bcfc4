"""The sections `checkpoint` and `logging` of a configuration; nothing here imports jax."""

import dataclasses
from typing import Literal

from rlhf_jax.checks import NonNegativeFloat, NonNegativeInt, PositiveInt, check_fields
from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """The section `checkpoint`: when the state is saved, and which checkpoints are kept.

    Attributes:
      every: steps between checkpoints; 0 saves by time alone.
      minutes: minimum time between checkpoints that are saved by time; 0 saves by steps alone. The
        last step, Ctrl-C and SIGTERM always save.
      keep: number of newest checkpoints that are kept.
      best_metric: a metric of the evaluations, such as eval/loss, that defines the best step. Its
        checkpoint is kept beside the newest, and an evaluation that is the best so far is followed
        by a checkpoint. Null: none.
      best_mode: whether the smallest or the largest value is the best.
      export_best: write the model of the best step to `hf/` instead of that of the last step.
    """

    every: NonNegativeInt = 0
    minutes: NonNegativeFloat = 10.0
    keep: PositiveInt = 2
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    export_best: bool = False

    def __post_init__(self) -> None:
        check_fields("checkpoint", self)
        if self.export_best and self.best_metric is None:
            raise InputError(
                "checkpoint.export_best needs a metric to judge by; give --checkpoint.best_metric "
                "one of the evaluation's, such as eval/loss, or set checkpoint.export_best to "
                "false."
            )


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
    """The section `logging`: what a run writes and shows while it trains.

    Attributes:
      log_every: steps between two lines of `metrics.jsonl`; a step with an evaluation has one in
        any case.
      eval_every: steps between two evaluations; null: ten evaluations a run; 0: only at the end.
      samples_every: steps between two entries of `samples.jsonl`; null: ten a run; 0: only at the
        end. Unless it is 0, there are samples of the model before the first step too.
      num_samples: responses per entry of `samples.jsonl`.
      progress: show the progress line on standard error.
      tensorboard: write TensorBoard event files to `run_dir/tensorboard`.
      wandb: send the metrics to Weights & Biases (needs the package `wandb`).
      wandb_project: the project that the run appears in.
    """

    log_every: PositiveInt = 1
    eval_every: NonNegativeInt | None = None
    samples_every: NonNegativeInt | None = None
    num_samples: NonNegativeInt = 8
    progress: bool = True
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "rlhf_jax"

    def __post_init__(self) -> None:
        check_fields("logging", self)
        if self.wandb and not self.wandb_project:
            raise InputError(
                "logging.wandb_project is empty, but logging.wandb needs the name of a project; "
                "set --logging.wandb_project"
            )
