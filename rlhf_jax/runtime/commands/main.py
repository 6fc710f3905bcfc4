"""The command `rlhf` with its sub-commands, and training as a Python call.

Nothing here imports jax before a sub-command begins its work, so that help is quick.
"""

import functools
import importlib.metadata
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax import runtime, training
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands import compile_for, pairs, report, terminal
from rlhf_jax.runtime.config import (
    EvaluateConfig,
    FilterConfig,
    GenerateConfig,
    RLHFConfig,
    RunConfig,
    config_of,
    resolve,
    trainer_named,
)
from rlhf_jax.training.trainer import Trainer

if TYPE_CHECKING:
    from rlhf_jax.runtime.run.stage import Stage, StageResult

WIDTH = 80
RewardFunction = Callable[..., list[float]]

_MODELS = ("model.path", "model.reward_path")
_ADAPTED = ("model.path", "model.adapter_path")
_GENERATION = ("generation.max_new_tokens", "generation.temperature", "generation.top_p")
_EVALUATION = ("kind", *_MODELS, "model.reference_path")
_RATES = ("pass_threshold", "min_pass_rate", "max_pass_rate")
_PIPELINE_FIRST = (
    *_MODELS,
    *(f"data.{stage}.path" for stage in ("sft", "reward", "ppo")),
    *("sft.num_epochs", "ppo.total_episodes", "ppo.kl_coef", "seed", "run_dir"),
)


class Command(NamedTuple):
    """A sub-command; `run` maps the arguments after its name to the exit status."""

    name: str
    summary: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `rlhf COMMAND ...`; the exit status is that of `commands/terminal.run`."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(importlib.metadata.version("rlhf-jax"))
        return 0
    commands = {command.name: command for command in all_commands()}
    if name not in commands:
        names = ", ".join(commands)
        print(f"error: There is no command {name!r}; the commands are {names}.", file=sys.stderr)
        return 2
    return commands[name].run(rest)


def all_commands() -> list[Command]:
    """One for each trainer, and the others."""
    return [
        *map(_training_command, training.TRAINERS),
        _command(
            "run",
            "supervised fine-tuning, a reward model and PPO in a row",
            RLHFConfig,
            lambda settings: runtime.run_rlhf(settings),
            first=_PIPELINE_FIRST,
            trains=True,
        ),
        _command(
            "generate",
            "responses of a model to prompts, as JSON lines",
            GenerateConfig,
            lambda settings: runtime.run_generate(settings),
            first=(*_ADAPTED, "prompt", "message", "data.path", "output", *_GENERATION, "seed"),
        ),
        _command(
            "evaluate",
            "perplexity of texts, accuracy on pairs, or win rates of responses",
            EvaluateConfig,
            lambda settings: runtime.run_evaluate(settings),
            first=(*_EVALUATION, "data.path", *_GENERATION, "evaluation.num_responses", "run_dir"),
        ),
        _command(
            "filter",
            "prompts that a model solves in a part of its responses, as JSON lines",
            FilterConfig,
            lambda settings: print(f"{runtime.run_filter(settings)} prompts"),
            first=(*_MODELS, "data.path", "output", "num_samples", *_RATES, *_GENERATION[:2]),
        ),
        Command(
            "compile-for",
            "memory and FLOPs of a step on devices that are not there",
            compile_for.main,
        ),
        Command("pairs", "preference pairs from labels, from prompts, or from samples", pairs.main),
        Command("report", "the page of a run, or one page of several runs", report.main),
    ]


def _command(
    name: str,
    summary: str,
    kind: type,
    work: Callable[[Any], object],
    *,
    first: Sequence[str],
    trains: bool = False,
) -> Command:
    """A command that calls `work` with the configuration of its flags.

    `terminal.run_command` reads it, and turns an error into a sentence and an exit status.
    """
    run = functools.partial(
        terminal.run_command, f"rlhf {name}", kind, work, first=first, trains=trains
    )
    return Command(name, summary, run)


def _training_command(trainer: Trainer) -> Command:
    inputs = (
        (*_MODELS, "data.path")
        if trainer.has_rewards
        else ("model.path", "data.path", "data.eval_path")
    )
    own = tuple(f"{trainer.name}.{name}" for name in trainer.first_settings)
    return _command(
        trainer.command,
        trainer.summary,
        config_of(trainer),
        lambda settings: print_result(trainer, train(trainer, settings)),
        first=(*inputs, *own, "optimizer.learning_rate", "seed", "run_dir"),
        trains=True,
    )


def train(
    trainer: Trainer | str,
    config: RunConfig | str | os.PathLike | Mapping[str, Any],
    reward_fn: RewardFunction | None = None,
) -> "StageResult":
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
      InputError: one sentence about a mistake in the configuration or the data.
    """
    from rlhf_jax.parallel import hosts
    from rlhf_jax.parallel.distributed import join
    from rlhf_jax.runtime.run import loop
    from rlhf_jax.runtime.run.progress import preparing
    from rlhf_jax.runtime.stages.shared import data_fingerprints

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


def stage_of(config: RunConfig, reward_fn: RewardFunction | None = None) -> "Stage":
    """The stage of a configuration: its data and models are loaded, its programs compiled."""
    from rlhf_jax.runtime.stages import groups, offline, online, sampled

    if config.trainer.compares_groups:
        return groups.GroupStage(config, reward_fn)
    if config.trainer.online:
        return online.OnlineStage(config, reward_fn)
    if config.trainer.samples_first:
        return sampled.SampledStage(config, reward_fn)
    if config.trainer.trains == "policy":
        return offline.PolicyStage(config)
    return offline.RewardModelStage(config)


def print_result(trainer: Trainer, result: "StageResult") -> None:
    """Prints the comparison before and after training, or else the last evaluation.

    Without held-out examples, and on all hosts but the first, nothing is printed.
    """
    from rlhf_jax.parallel import hosts
    from rlhf_jax.runtime.evaluation.policies import read_evaluation
    from rlhf_jax.runtime.report.tables import format_table

    if not hosts.is_first():
        return
    evaluation = read_evaluation(result.run_dir)
    if evaluation is not None and evaluation["table"]:
        print(format_table(evaluation["table"]), flush=True)
        return
    headlines = [each.metric for each in trainer.headlines]
    names = dict.fromkeys([*headlines, "eval/loss", "eval/accuracy"])
    values = {name: result.metrics[name] for name in names if name in result.metrics}
    shown = [f"{name} {value:.4g}" for name, value in values.items() if name.startswith("eval/")]
    if shown:
        print(f"{trainer.name}: {', '.join(shown)}", flush=True)


def train_function(trainer: Trainer) -> Callable[..., "StageResult"]:
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


def overview() -> str:
    """The text of `rlhf --help`."""
    commands = all_commands()
    column = max(len(command.name) for command in commands) + 4
    lines = [
        textwrap.fill(
            f"  {command.name:<{column - 2}}{command.summary}",
            WIDTH,
            subsequent_indent=" " * column,
        )
        for command in commands
    ]
    return "\n".join(
        [
            "usage: rlhf COMMAND [--config FILE.yaml] [--section.key VALUE ...]",
            "",
            "Reinforcement learning from human feedback for language models, in JAX.",
            "",
            *lines,
            "",
            "`rlhf COMMAND --help` lists the settings of a command, `rlhf --version` the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
