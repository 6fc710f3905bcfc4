"""The command `rlhf`: its sub-commands, and what `--help` says of them.

Nothing here imports jax before a sub-command begins its work, so that help is quick.
"""

import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlhf_jax import training
from rlhf_jax.training.trainer import Trainer

WIDTH = 80


class Command(NamedTuple):
    """A sub-command.

    Attributes:
      name: after `rlhf`.
      summary: one line of help.
      run: takes the arguments after the name, and returns the exit status.
    """

    name: str
    summary: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `rlhf COMMAND ...`; the exit status is that of `commands/terminal.run`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {command.name: command for command in all_commands()}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(importlib.metadata.version("rlhf-jax"))
        return 0
    if name not in commands:
        names = ", ".join(commands)
        print(f"error: There is no command {name!r}; the commands are {names}.", file=sys.stderr)
        return 2
    return commands[name].run(rest)


def all_commands() -> list[Command]:
    """One for each trainer, and the others."""
    return [
        *(_training_command(trainer) for trainer in training.TRAINERS),
        _command(
            "run",
            "supervised fine-tuning, a reward model and PPO in a row",
            ("RLHFConfig", "run_rlhf"),
            first=_PIPELINE_FIRST,
            trains=True,
        ),
        _command(
            "generate",
            "responses of a model to prompts, as JSON lines",
            ("GenerateConfig", "run_generate"),
            first=("model.path", "prompt", "data.path", "output", *_GENERATION, "seed"),
        ),
        _command(
            "evaluate",
            "perplexity of texts, accuracy on pairs, or win rates of responses",
            ("EvaluateConfig", "run_evaluate"),
            first=("kind", *_MODELS, "model.reference_path", "data.path", *_GENERATION, "run_dir"),
        ),
        Command("compile-for", "memory and time of a step on devices that are not there", _compile),
        Command("pairs", "preference pairs from texts with labels, or from prompts", _pairs),
    ]


_MODELS = ("model.path", "model.reward_path")
_GENERATION = ("generation.max_new_tokens", "generation.temperature", "generation.top_p")
_PIPELINE_FIRST = (
    *_MODELS,
    *(f"data.{stage}.path" for stage in ("sft", "reward", "ppo")),
    "sft.num_epochs",
    "ppo.total_episodes",
    "ppo.kl_coef",
    "seed",
    "run_dir",
)


def _command(
    name: str,
    summary: str,
    names: tuple[str, str],
    *,
    first: tuple[str, ...] = (),
    trains: bool = False,
) -> Command:
    """A command with a configuration, of the names (class in `config`, function of `runtime`)."""

    def run(argv: list[str]) -> int:
        from rlhf_jax import runtime
        from rlhf_jax.runtime import config
        from rlhf_jax.runtime.commands import terminal

        def work(settings):
            return getattr(runtime, names[1])(settings)

        kind = getattr(config, names[0])
        return terminal.run_command(f"rlhf {name}", kind, work, argv, first=first, trains=trains)

    return Command(name, summary, run)


def _training_command(trainer: Trainer) -> Command:
    def run(argv: list[str]) -> int:
        from rlhf_jax import runtime
        from rlhf_jax.runtime import config
        from rlhf_jax.runtime.commands import terminal

        def work(settings):
            return runtime.train(trainer, settings)

        name, kind, first = f"rlhf {trainer.command}", config.config_of(trainer), _first(trainer)
        return terminal.run_command(name, kind, work, argv, first=first, trains=True)

    return Command(trainer.command, trainer.summary, run)


def _first(trainer: Trainer) -> tuple[str, ...]:
    """The settings of a trainer that its help lists first."""
    models = _MODELS if trainer.online else _MODELS[:1]
    own = tuple(f"{trainer.name}.{name}" for name in trainer.first_settings)
    return (*models, "data.path", *own, "optimizer.learning_rate", "seed", "run_dir")


def _compile(argv: list[str]) -> int:
    from rlhf_jax.runtime.commands import compile_for

    return compile_for.main(argv)


def _pairs(argv: list[str]) -> int:
    from rlhf_jax.runtime.commands import pairs

    return pairs.main(argv)


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
