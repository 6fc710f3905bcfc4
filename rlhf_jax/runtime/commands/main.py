"""The command `rlhf`: its sub-commands, and what `--help` says of them.

Nothing here imports jax before a sub-command begins its work, so that help is quick.
"""

import importlib
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
        from rlhf_jax import __version__

        print(__version__)
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
        _command("run", "supervised fine-tuning, a reward model and PPO in a row", "pipeline"),
        _command("generate", "responses of a model to prompts, as JSON lines", "generate"),
        _command("evaluate", "a model on held-out texts, pairs or prompts", "evaluate"),
        _command("compile-for", "memory, FLOPs and collectives on devices not there", "compile_for"),
        _command("pairs", "preference pairs from labels or from prompts", "pairs"),
    ]


def _command(name: str, summary: str, module: str) -> Command:
    """A command whose module in this folder has `main(argv)`."""

    def run(argv: list[str]) -> int:
        return importlib.import_module(f"rlhf_jax.runtime.commands.{module}").main(argv)

    return Command(name, summary, run)


def _training_command(trainer: Trainer) -> Command:
    def run(argv: list[str]) -> int:
        from rlhf_jax.runtime.commands import train

        return train.main(trainer, argv)

    return Command(trainer.command, trainer.summary, run)


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
            "`rlhf COMMAND --help` lists the settings of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
