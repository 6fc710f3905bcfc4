"""Training: one command and one Python call for every trainer in `TRAINERS`."""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_jax.runtime.commands import terminal
from rlhf_jax.runtime.config import RunConfig, config_of, trainer_named
from rlhf_jax.training.trainer import Trainer

if TYPE_CHECKING:
    from rlhf_jax.runtime.run.loop import StageResult

RewardFunction = Callable[..., list[float]]


def main(trainer: Trainer, argv: list[str]) -> int:
    """The command `rlhf NAME`; its exit status."""
    return terminal.run_command(
        f"rlhf {trainer.command}",
        config_of(trainer),
        lambda config: train(trainer, config),
        argv,
        first=first_settings(trainer),
        trains=True,
    )


def first_settings(trainer: Trainer) -> tuple[str, ...]:
    """The settings that people change first."""
    path = ("model.reward_path",) if trainer.online else ()
    own = tuple(f"{trainer.name}.{name}" for name in trainer.first_settings)
    shared = ("optimizer.learning_rate", "seed", "run_dir")
    return ("model.path", *path, "data.path", *own, *shared)


def train(
    trainer: Trainer | str,
    config: RunConfig | str | os.PathLike | Mapping[str, Any],
    reward_fn: RewardFunction | None = None,
) -> "StageResult":
    """Trains with one of the trainers in `TRAINERS`, from the newest checkpoint where there is one.

    Args:
      trainer: its record, or its name.
      config: a configuration of `config_of(trainer)`, a YAML file, or a nested dict.
      reward_fn: for online trainers: f(prompts, completions, **columns) -> one number for each
        completion, columns being the other columns of the data set. It has weight 1 beside the
        sources of `rewards`, and replaces a `model.reward_path` that none of these stands for.

    Returns:
      The run folder, and the last value of each metric.

    Raises:
      InputError: one sentence about what is wrong with the configuration or the data.
    """
    from rlhf_jax.errors import InputError
    from rlhf_jax.parallel.distributed import join
    from rlhf_jax.runtime.config import resolve
    from rlhf_jax.runtime.run import loop
    from rlhf_jax.runtime.stages.offline import OfflineStage
    from rlhf_jax.runtime.stages.online import OnlineStage

    trainer = trainer_named(trainer) if isinstance(trainer, str) else trainer
    config = resolve(config_of(trainer), config)
    if reward_fn is not None and not trainer.online:
        raise InputError(f"{trainer.name} reads no reward; call it without reward_fn.")
    join(config.distributed)
    if trainer.online:
        return loop.run(lambda: OnlineStage(config, reward_fn), config)
    return loop.run(lambda: OfflineStage(config), config)


def train_function(trainer: Trainer) -> Callable[..., "StageResult"]:
    """`train` of one trainer, as `runtime.train_NAME`."""

    def call(config, reward_fn=None):
        return train(trainer, config, reward_fn)

    call.__name__ = call.__qualname__ = f"train_{trainer.name}"
    call.__doc__ = f"{trainer.summary}\n\n{(train.__doc__ or '').partition('Args:')[2]}"
    return call
