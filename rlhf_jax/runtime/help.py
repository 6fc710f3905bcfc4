"""The help of a command: the settings that people change first, then all by section."""

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

from rlhf_jax.runtime.parsing import type_name

WIDTH, NOTE_COLUMN = 80, 36


def help_text(kind: type, command: str, first: Sequence[str] = ()) -> str:
    """The help of a command whose settings are the fields of a dataclass.

    Each setting has its default and the first sentence of its note.

    Args:
      kind: the configuration; sections are dataclasses.
      command: such as "rlhf ppo".
      first: keys of the settings that are listed first, such as "model.path"; the rest of their
        sections comes before the others.
    """
    summary = (kind.__doc__ or "").strip().partition("\n")[0]
    parts = [
        f"usage: {command} [--config FILE.yaml] [--section.key VALUE ...]",
        textwrap.fill(summary, WIDTH),
        "\n".join(
            [
                _entry("--config FILE.yaml", "a file of settings; flags are laid over it"),
                _entry("--print_config", "print the settings as YAML, and exit"),
                _entry("-h, --help", "print this text, and exit"),
            ]
        ),
    ]
    sections = _entries(kind(), first)
    entries = {key: entry for section in sections.values() for key, entry in section.items()}
    chosen = [key for key in first if key in entries]
    if chosen:
        title = "Settings most often changed, with their defaults:"
        parts.append("\n".join([title, *(entries[key] for key in chosen)]))
    names = dict.fromkeys([*(key.rpartition(".")[0] for key in chosen), *sections])
    for name in sorted(names, key=lambda name: name == ""):
        rest = [entry for key, entry in sections[name].items() if key not in chosen]
        title = f"Section {name}:" if name else "Other settings:"
        parts += ["\n".join([title, *rest])] if rest else []
    return "\n\n".join(parts) + "\n"


def _entries(config: Any, first: Sequence[str]) -> dict[str, dict[str, str]]:
    """Section -> key -> entry of the help.

    Of a section of the same class as an earlier one, only settings of `first` and those with
    another default have entries.
    """
    entries: dict[str, dict[str, str]] = {}
    earlier: dict[type, tuple[str, Any]] = {}
    for name, section in _sections(config, ""):
        original, defaults = earlier.setdefault(type(section), (name, section))
        values = {key: each for key, each in vars(section).items() if not _is_section(each)}
        entries[name] = {}
        changed = {key for key, each in values.items() if each != vars(defaults)[key]}
        if original != name:
            but = ", but" if changed else ""
            entries[name][name] = f"  the settings of the section {original}{but}"
        hints, notes = get_type_hints(type(section)), attribute_notes(type(section))
        for key, default in values.items():
            full = f"{name}.{key}".removeprefix(".")
            if original == name or key in changed or full in first:
                entries[name][full] = _setting(full, hints[key], default, notes.get(key, ""))
    return entries


def _sections(config: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, dataclass) of a configuration and of the sections in it."""
    yield name, config
    for key, value in vars(config).items():
        if _is_section(value):
            yield from _sections(value, f"{name}.{key}".removeprefix("."))


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _setting(key: str, annotation: Any, default: Any, note: str) -> str:
    shown = (
        json.dumps(default) if default is None or isinstance(default, (bool, tuple)) else default
    )
    note = re.split(r"(?<!al)\.(?:\s|$)", note, maxsplit=1)[0]
    kind = type_name(annotation, key)
    if default is None:
        kind = kind.removesuffix(" or null")
    choices = kind.removeprefix("one of ").split(", ") if kind.startswith("one of ") else [None]
    is_plain = annotation in (bool, int, float, str) or kind == "str"
    if not is_plain and not all(f'"{choice}"' in note for choice in choices):
        note = f"{note} ({kind})"
    return _entry(f"--{key} {shown}", note.strip())


def _entry(flag: str, note: str) -> str:
    """The flag, and the note in a column beside it, or below a longer flag."""
    left, indent = f"  {flag}", " " * NOTE_COLUMN
    if len(left) < NOTE_COLUMN:
        left = f"{left:<{NOTE_COLUMN}}"
    else:
        left += f"\n{indent}"
    return (left + f"\n{indent}".join(textwrap.wrap(note, WIDTH - NOTE_COLUMN))).rstrip()


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
