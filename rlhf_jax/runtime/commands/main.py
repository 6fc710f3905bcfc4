"""The command `rlhf` and its sub-commands.

Nothing here imports jax before a sub-command begins its work, so that help is quick.
"""

import functools
import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhf_jax import runtime, training
from rlhf_jax.runtime import config
from rlhf_jax.runtime.commands import compile_for, pairs, report, terminal
from rlhf_jax.training.trainer import Trainer

WIDTH = 80

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
            config.RLHFConfig,
            lambda settings: runtime.run_rlhf(settings),
            first=_PIPELINE_FIRST,
            trains=True,
        ),
        _command(
            "generate",
            "responses of a model to prompts, as JSON lines",
            config.GenerateConfig,
            lambda settings: runtime.run_generate(settings),
            first=(*_ADAPTED, "prompt", "message", "data.path", "output", *_GENERATION, "seed"),
        ),
        _command(
            "evaluate",
            "perplexity of texts, accuracy on pairs, or win rates of responses",
            config.EvaluateConfig,
            lambda settings: runtime.run_evaluate(settings),
            first=(*_EVALUATION, "data.path", *_GENERATION, "evaluation.num_responses", "run_dir"),
        ),
        _command(
            "filter",
            "prompts that a model solves in a part of its responses, as JSON lines",
            config.FilterConfig,
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
        config.config_of(trainer),
        lambda settings: _train(trainer, settings),
        first=(*inputs, *own, "optimizer.learning_rate", "seed", "run_dir"),
        trains=True,
    )


def _train(trainer: Trainer, settings: Any) -> None:
    result = runtime.train(trainer, settings)
    from rlhf_jax.runtime.commands.train import print_result

    print_result(trainer, result)


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
