"""The help of a command: the settings that people change first, then all by section."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

from rlhf_jax.runtime.parsing import type_name

WIDTH = 80


def help_text(kind: type, command: str, first: Sequence[str] = ()) -> str:
    """The help of a command whose settings are the fields of a dataclass.

    Args:
      kind: the configuration; sections are dataclasses.
      command: such as "rlhf ppo".
      first: keys of the settings that are listed first, such as "model.path".
    """
    summary = (kind.__doc__ or "").strip().partition("\n")[0]
    parts = [
        f"usage: {command} [--config FILE.yaml] [--section.key VALUE ...]",
        textwrap.fill(summary, WIDTH),
        "\n".join(
            [
                _entry("--config FILE.yaml", "a file of settings; flags are laid over it"),
                _entry("--print_config", "print the resulting settings as YAML, and exit"),
                _entry("-h, --help", "print this text, and exit"),
            ]
        ),
    ]
    settings = list(_settings(kind(), ""))
    if first:
        chosen = [entry for key in first for name, entry in settings if name == key]
        parts.append("Settings most often changed:\n" + "\n".join(chosen))
    sections: dict[str, list[str]] = {}
    for key, entry in settings:
        sections.setdefault(key.rpartition(".")[0], []).append(entry)
    for name, entries in sections.items():
        title = f"Section {name}:" if name else "Other settings:"
        parts.append(title + "\n" + "\n".join(entries))
    return "\n\n".join(parts) + "\n"


def _settings(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, entry of the help) of each setting of a dataclass and of the sections in it."""
    hints, notes = get_type_hints(type(section)), attribute_notes(type(section))
    for name, default in vars(section).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(default):
            yield from _settings(default, f"{key}.")
        else:
            yield key, _setting(key, hints[name], default, notes.get(name, ""))


def _setting(key: str, annotation: Any, default: Any, note: str) -> str:
    shown = "null" if default is None else list(default) if default == () else default
    return _entry(f"--{key}", f"{note} ({type_name(annotation, key)}; default: {shown})".strip())


def _entry(flag: str, text: str) -> str:
    indent = " " * 6
    body = textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return f"  {flag}\n{body}"


def attribute_notes(kind: Any) -> dict[str, str]:
    """The notes on attributes in the docstrings of a class and its bases, by name.

    A note on several, `n_layer, n_head: sizes`, is that of each.
    """
    notes: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")[2]
        for names, note in re.findall(r"^  ([\w, ]+): (.+(?:\n {4}.+)*)", section, re.M):
            notes |= dict.fromkeys(re.split(r",\s*", names), " ".join(note.split()))
    return notes
