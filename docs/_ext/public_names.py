"""The public names, and their names in the reference. Without Sphinx: tests read it too.

A module or package with `__all__` says so itself. In one without, every function and class that it
defines and whose name has no underscore in front is public.
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import rlhf_jax
from rlhf_jax import functional, training
from rlhf_jax.models import huggingface
from rlhf_jax.training.trainer import Trainer

DOCS = Path(__file__).resolve().parents[1]

# Packages that name what they offer, and modules from which users take names directly.
PACKAGES = ("rlhf_jax.functional", "rlhf_jax.rollout", "rlhf_jax.parallel", "rlhf_jax.data")
MODULES = (
    "rlhf_jax.batches",
    "rlhf_jax.errors",
    "rlhf_jax.models.cache",
    "rlhf_jax.models.family",
    "rlhf_jax.models.heads",
    "rlhf_jax.models.huggingface",
    "rlhf_jax.models.interface",
    "rlhf_jax.models.reading",
    "rlhf_jax.models.stacked",
    "rlhf_jax.models.writing",
    "rlhf_jax.rollout.sampling",
    "rlhf_jax.rollout.settings",
    "rlhf_jax.rollout.shaping",
    "rlhf_jax.training.trainer",
    "rlhf_jax.training.settings",
    "rlhf_jax.training.online",
    "rlhf_jax.training.epochs",
    "rlhf_jax.training.trainable",
    "rlhf_jax.training.state",
    "rlhf_jax.runtime",
)
# A module whose classes users name, while its functions serve the commands.
CONFIGURATION = "rlhf_jax.runtime.config"


def public_names(name: str) -> list[str]:
    """Public functions and classes of a module or package, in the order of the source."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        names = [each for each in module.__all__ if _is_documented(getattr(module, each))]
        return sorted(names, key=lambda each: _place(getattr(module, each)))
    names = [
        each
        for each, value in vars(module).items()
        if not each.startswith("_") and getattr(value, "__module__", None) == name
    ]
    return [each for each in names if _is_documented(getattr(module, each))]


def functional_names(file: str) -> list[str]:
    """Names of `rlhf_jax.functional` that are defined in one of its files, such as "kl"."""
    home = f"{functional.__name__}.{file}"
    return [
        name
        for name in public_names(functional.__name__)
        if getattr(functional, name).__module__ == home
    ]


def functional_files() -> list[str]:
    """The files of `rlhf_jax.functional` that define a public name."""
    homes = {getattr(functional, name).__module__ for name in functional.__all__}
    return sorted(home.rpartition(".")[2] for home in homes)


def documented_names(argument: str) -> list[tuple[str, str]]:
    """(module, name) of each entry that the directive `public` makes of its argument.

    That is a module, or "MODULE::NAME". The functions of `rlhf_jax.functional.kl` are entries of
    `rlhf_jax.functional`, from which they are to be imported.
    """
    module, _, name = argument.partition("::")
    if name:
        return [(module, name)]
    package, _, file = argument.rpartition(".")
    if package == functional.__name__:
        return [(package, name) for name in functional_names(file)]
    return [(argument, name) for name in public_names(argument)]


def trainer_names(trainer: Trainer) -> list[tuple[str, str]]:
    """(module, name) of each public name in a trainer's own files: its steps and its settings."""
    files = dict.fromkeys((trainer.steps.__name__, trainer.settings.__module__))
    own = (trainer.name, f"{trainer.name}_settings")
    names: dict[object, tuple[str, str]] = {}
    for file in (file for file in files if file.rpartition(".")[2] in own):
        for module, name in documented_names(file):
            names.setdefault(getattr(importlib.import_module(module), name), (module, name))
    return list(names.values())


def trainer_table() -> list[str]:
    """Lines of Markdown: the command of each trainer, its summary and its settings.

    A command has a link where `docs/commands/` has a page of the trainer's name.
    """
    lines = ["| Command | | Settings |", "| --- | --- | --- |"]
    for trainer in training.TRAINERS:
        command = f"`rlhf {trainer.command}`"
        if f"commands/{trainer.name}" in trainer_pages():
            command = f"[{command}]({trainer.name}.md)"
        name = trainer.settings.__name__
        settings = next(".".join(entry) for entry in trainer_names(trainer) if entry[1] == name)
        lines.append(f"| {command} | {trainer.summary} | {{py:obj}}`{trainer.name} <{settings}>` |")
    return lines


def trainer_pages() -> list[str]:
    """The pages of trainers in `docs/`, in the order of `TRAINERS`, as far as there are any."""
    pages = [f"commands/{trainer.name}" for trainer in training.TRAINERS]
    return [page for page in pages if (DOCS / f"{page}.md").exists()]


def family_files() -> list[str]:
    """The modules with the models and the configurations of the model families."""
    families = huggingface.FAMILIES
    files = [each.__module__ for family in families for each in (family.model, family.config)]
    return list(dict.fromkeys(files))


def required_names() -> set[tuple[str, str]]:
    """All (module, name) that the reference has to hold."""
    modules = (*PACKAGES, *MODULES, *family_files())
    names = {(module, name) for module in modules for name in public_names(module)}
    names |= {entry for trainer in training.TRAINERS for entry in trainer_names(trainer)}
    configuration = importlib.import_module(CONFIGURATION)
    names |= {
        (CONFIGURATION, name)
        for name in public_names(CONFIGURATION)
        if inspect.isclass(getattr(configuration, name))
    }
    compiled = set(rlhf_jax.__all__) - {"__version__", "functional"}
    return names | {(functional.__name__, name) for name in compiled}


def _is_documented(value: object) -> bool:
    return inspect.isfunction(value) or inspect.isclass(value)


def _place(value: object) -> tuple[str, int]:
    module = inspect.getmodule(value)
    assert isinstance(module, ModuleType)
    return module.__name__, inspect.getsourcelines(value)[1]
