"""Training as a Python call, for every trainer in `TRAINERS`."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.distributed import join
from rlhf_jax.runtime.config import RunConfig, config_of, resolve, trainer_named
from rlhf_jax.runtime.evaluation.policies import read_evaluation
from rlhf_jax.runtime.report.tables import format_table
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.run.progress import preparing
from rlhf_jax.runtime.run.stage import Stage, StageResult
from rlhf_jax.runtime.stages.groups import GroupStage
from rlhf_jax.runtime.stages.offline import PolicyStage, RewardModelStage
from rlhf_jax.runtime.stages.online import OnlineStage
from rlhf_jax.runtime.stages.sampled import SampledStage
from rlhf_jax.runtime.stages.shared import data_fingerprints
from rlhf_jax.training.trainer import Trainer

RewardFunction = Callable[..., list[float]]


def train(
    trainer: Trainer | str,
    config: RunConfig | str | os.PathLike | Mapping[str, Any],
    reward_fn: RewardFunction | None = None,
) -> StageResult:
    """Trains with one of the trainers in `TRAINERS`, from the newest checkpoint if there is one.

    Args:
      trainer: its record, or its name.
      config: a configuration of the class `config_of(trainer)`, a YAML file, or a nested dict.
      reward_fn: for trainers that score responses: f(prompts, completions, **columns) -> one number
        for each completion, columns being the other columns of the data set. It has weight 1 beside
        the sources of `rewards`, and replaces a `model.reward_path` that none of these stands for.

    Returns:
      The run folder, and the last value of each metric.

    Raises:
      InputError: one sentence about what is wrong with the configuration or the data.
    """
    trainer = trainer_named(trainer) if isinstance(trainer, str) else trainer
    settings = resolve(config_of(trainer), config)
    if reward_fn is not None and not trainer.has_rewards:
        raise InputError(f"{trainer.name} reads no rewards; call it without reward_fn.")
    join(settings.distributed)

    def make_stage():
        shown = settings.logging.progress and hosts.is_first()
        with preparing(trainer.name, "loading the data and the model", shown=shown):
            return stage_of(settings, reward_fn)

    fingerprints = functools.partial(data_fingerprints, settings)
    return loop.run(make_stage, settings, fingerprints)


def stage_of(config: RunConfig, reward_fn: RewardFunction | None = None) -> Stage:
    """The stage of a configuration: its data and models are loaded, its programs compiled."""
    if config.trainer.compares_groups:
        return GroupStage(config, reward_fn)
    if config.trainer.online:
        return OnlineStage(config, reward_fn)
    if config.trainer.samples_first:
        return SampledStage(config, reward_fn)
    return (PolicyStage if config.trainer.trains == "policy" else RewardModelStage)(config)


def print_result(trainer: Trainer, result: StageResult) -> None:
    """Prints the comparison before and after training, or else the last evaluation.

    Without held-out examples, and on all hosts but the first, nothing is printed.
    """
    if not hosts.is_first():
        return
    evaluation = read_evaluation(result.run_dir)
    if evaluation is not None and evaluation["table"]:
        print(format_table(evaluation["table"]), flush=True)
        return
    headlines = [each.metric for each in trainer.headlines]
    names = dict.fromkeys([*headlines, *result.metrics])
    values = {name: result.metrics[name] for name in names if name in result.metrics}
    shown = [f"{name} {value:.4g}" for name, value in values.items() if name.startswith("eval/")]
    if shown:
        print(f"{trainer.name}: {', '.join(shown)}", flush=True)


def train_function(trainer: Trainer) -> Callable[..., StageResult]:
    """`train` of one trainer, as `runtime.train_NAME`."""

    def offline(config):
        return train(trainer, config)

    def scored(config, reward_fn=None):
        return train(trainer, config, reward_fn)

    call: Callable[..., StageResult] = scored if trainer.has_rewards else offline
    call.__name__ = call.__qualname__ = f"train_{trainer.name}"
    summary = trainer.summary[:1].upper() + trainer.summary[1:]
    call.__doc__ = f"{summary}; arguments and result are those of `train`."
    return call
