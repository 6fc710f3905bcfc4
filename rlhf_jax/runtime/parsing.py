"""From flags and YAML to a configuration and back, with one sentence for each mistake.

The types are those of the dataclasses: bool, int, float, str, `Literal`, unions with None, tuples,
dicts, and dataclasses as sections.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf_jax.errors import InputError, shown
from rlhf_jax.runtime.yaml_files import checked_path, parsed_yaml, read_yaml

Values = dict[str, Any]


class Text(str):
    """The text of a flag, which is YAML unless its setting is a string."""


class Flags(NamedTuple):
    """The parts of a command line."""

    files: list[str]  # of `--config`, in order
    settings: list[tuple[str, str]]  # (key, text) of each `--section.key text`
    print_config: bool  # whether `--print_config` is there


def split_flags(argv: Sequence[str]) -> Flags:
    """The parts of `--config FILE --section.key value --section.key=value ...`."""
    flags = Flags([], [], "--print_config" in argv)
    rest = iter(argument for argument in argv if argument != "--print_config")
    for argument in rest:
        if not argument.startswith("--") or argument == "--":
            raise InputError(
                f"{argument!r} is no option; settings are given as --section.key value."
            )
        key, equals, text = argument[2:].partition("=")
        value = text if equals else next(rest, None)
        if value is None:
            raise InputError(f"--{key} needs a value: --{key} VALUE.")
        if key == "config":
            flags.files.append(value)
        else:
            flags.settings.append((key, value))
    return flags


def read_values(kind: type, flags: Flags) -> Values:
    """The nested values of the files, with those of the flags laid over them."""
    values: Values = {}
    for file in flags.files:
        content = checked_section(read_yaml(file), file)
        values = merge(values, content)
    for key, text in flags.settings:
        value: Any = _from_yaml(text) if _is_class(_field_type(kind, key)) else Text(text)
        for name in reversed(key.split(".")):
            value = {name: value}
        values = merge(values, value)
    return values


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Values:
    """`below` with the values of `above` laid over it, section by section."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def checked_section(content: Any, name: str) -> Mapping[Any, Any]:
    """The content, if it holds keys and values; else an InputError."""
    if not isinstance(content, Mapping):
        held = "is empty" if content is None else f"holds {shown(content, str)[:40]!r}"
        raise InputError(f"{name} {held}; write one `key: value` to a line.")
    return content


def _field_type(kind: Any, key: str) -> Any:
    """The annotation of the setting `section.key`; an InputError without such a setting."""
    root, parts = kind, key.split(".")
    for place, part in enumerate(parts):
        section = ".".join(parts[:place])
        if get_origin(kind) is dict and place == len(parts) - 1:
            return str
        if not _is_class(kind):
            raise InputError(f"--{section} is a setting and no section; --{key} is unknown.")
        if part not in _field_names(kind):
            raise InputError(_unknown(kind, section, part, root, parts[-1]))
        kind = get_type_hints(kind)[part]
    return kind


def build(
    kind: Any,
    values: Mapping[str, Any],
    default: Any = None,
    prefix: str = "",
    root: Any = None,
) -> Any:
    """A dataclass of nested values; missing ones are as in `default`, or by the class.

    Args:
      prefix: of the keys in messages.
      root: the class of the full configuration, whose keys a message may suggest.

    Raises an InputError that names a key that is unknown or whose value has another type.
    """
    hints = get_type_hints(kind)
    for name in values:
        if not isinstance(name, str):
            raise InputError(f"{prefix}{shown(name)} is no key; keys are the names of settings.")
        if name not in _field_names(kind):
            raise InputError(_unknown(kind, prefix.removesuffix("."), name, root or kind))
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    if default is not None:
        defaults = vars(default)
    converted = {
        name: _convert(hints[name], value, f"{prefix}{name}", defaults[name], root or kind)
        for name, value in values.items()
    }
    return kind(**converted) if default is None else dataclasses.replace(default, **converted)


def _convert(annotation: Any, value: Any, key: str, default: Any, root: Any) -> Any:
    """The value in the type of its setting, or an InputError."""
    if _is_class(annotation):
        section = default if dataclasses.is_dataclass(default) else None
        content = checked_section(value, f"The section {key!r}")
        return build(annotation, content, section, f"{key}.", root)
    kinds = _alternatives(annotation)
    if isinstance(value, Text) and str in kinds and value.strip() not in ("null", "~"):
        kinds = tuple(kind for kind in kinds if kind is not type(None))  # empty text, or a comment
    for kind in kinds:
        fits, converted = _fit(kind, value, key)
        if fits:
            return converted
    text = "null" if value is None or value == "null" else shown(value)
    raise InputError(f"{key} must be {type_name(annotation, key)}, but is {text}.")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, None and numbers first: a flag `null` is no text."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    order = {type(None): 0, bool: 1, int: 2, float: 3}
    return tuple(sorted(get_args(annotation), key=lambda kind: order.get(kind, 4)))


def _fit(kind: Any, value: Any, key: str) -> tuple[bool, Any]:
    """(whether a value is of a type, the value converted)."""
    if kind is str:
        return isinstance(value, str), checked_path(key, value)
    if isinstance(value, Text) and get_origin(kind) is not Literal:
        value = _from_yaml(value)
    if kind is type(None):
        return value is None, None
    if kind is bool:
        return isinstance(value, bool), value
    if kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
        if fits and abs(value) >= 2**63:
            raise InputError(f"{key} must be an int of 64 bits, but is {shown(value)}.")
        return fits, value
    if kind is float:
        return _fit_float(value, key)
    if get_origin(kind) is Literal:
        return value in get_args(kind), str(value) if isinstance(value, Text) else value
    if get_origin(kind) is dict:
        return _fit_dict(get_args(kind)[1], value)
    return _fit_tuple(kind, value, key)


def _fit_dict(kind: Any, value: Any) -> tuple[bool, Any]:
    """The same of a dict with keys that are texts, and values that are too, or any of JSON."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False, value
    if kind is str:
        return all(isinstance(part, str) for part in value.values()), dict(value)
    parts = {k: _from_yaml(v) if isinstance(v, Text) else v for k, v in value.items()}
    return _is_json(parts), parts


def _is_json(value: Any) -> bool:
    """Whether JSON can represent a value, whose mappings have keys that are texts."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(part) for key, part in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value is None or (is_finite and isinstance(value, (bool, int, float, str)))


def _fit_float(value: Any, key: str) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, value
    try:
        number = float(value)  # YAML reads 1e-3 as a text
    except ValueError:
        return False, value
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{key} must be a finite number, but is {shown(value)}.")
    return True, number


def _fit_tuple(kind: Any, value: Any, key: str) -> tuple[bool, Any]:
    members = get_args(kind)
    if not isinstance(value, (list, tuple)):
        return False, value
    if _is_class(members[0]):
        return True, tuple(_element(members[0], each, key) for each in value)
    if members[-1] is not Ellipsis and len(value) != len(members):
        return False, value
    pairs = [_fit(members[0], each, key) for each in value]
    return all(fits for fits, _ in pairs), tuple(each for _, each in pairs)


def _element(kind: Any, value: Any, key: str) -> Any:
    """An element of a list of sections, such as `rewards`."""
    if dataclasses.is_dataclass(value):
        return value
    if not isinstance(value, Mapping) or not value:
        raise InputError(
            f"{key}: each element has at least one key, such as {{path: folder}}, or "
            f"{{weight: 1.0}} for the reward model of model.reward_path, but one is "
            f"{shown(value)}."
        )
    return build(kind, value, None, f"{key}: ")


_EXAMPLES = {
    "rewards": "[{function: module:function}]",
    "best_of": "[1, 2, 4]",
    "prompt_tokens": "[2, 8]",
    "local_device_ids": "[0, 1]",
    "columns": "{prompt: question}",
    "task": "{digits: 3}",
    "kwargs": "{pattern: '[0-9]+'}",
    "chat_template_kwargs": "{enable_thinking: false}",
}


def type_name(annotation: Any, key: str = "") -> str:
    """The type of a setting, as help and error messages name it.

    >>> type_name(int | None), type_name(Literal["a", "b"]), type_name(tuple[int, ...], "x.best_of")
    ('int or null', 'one of a, b', 'a list such as [1, 2, 4]')
    """
    if get_origin(annotation) in (Union, types.UnionType):
        parts = sorted(get_args(annotation), key=lambda kind: kind is type(None))
        return " or ".join(type_name(part, key) for part in parts)
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    example = _EXAMPLES.get(key.rpartition(".")[2], "")
    if get_origin(annotation) in (tuple, dict):
        name = "a list" if get_origin(annotation) is tuple else "keys and values"
        return f"{name} such as {example}" if example else name
    return annotation.__name__


def _from_yaml(text: str) -> Any:
    try:
        return parsed_yaml(text)
    except ValueError:
        return text


def _field_names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _is_class(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _unknown(kind: Any, section: str, name: str, root: Any, last: str = "") -> str:
    """A message with the keys that there are, and the intended one.

    That is a key of another section with this name, the nearest one in this section, or, in a
    section that is unknown, a key with the name of the last part.
    """
    near = (
        _elsewhere(root, section, name)
        or difflib.get_close_matches(name, _field_names(kind), n=1)
        or _elsewhere(root, section, last)
    )
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    names = ", ".join(_field_names(kind))
    if section.endswith(": "):  # an element of a list
        return f"Unknown key {name!r}{hint} in {section[:-2]}; each has {names}."
    key = f"{section}.{name}" if section else name
    where = f"the section {section!r} has" if section else "there are"
    return f"Unknown key {key!r}{hint}; {where} {names}."


def _elsewhere(root: Any, section: str, name: str) -> list[str]:
    """Keys of this name in other sections, by preference in parts for the section named."""
    keys = [key for key in _all_keys(root, "") if key.rpartition(".")[2] == name]
    return ([key for key in keys if section in key.split(".")] or keys)[:4]


def _all_keys(kind: Any, prefix: str) -> Iterator[str]:
    for name, annotation in get_type_hints(kind).items():
        if _is_class(annotation):
            yield from _all_keys(annotation, f"{prefix}{name}.")
        elif name in _field_names(kind):
            yield f"{prefix}{name}"


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts and lists, ready for YAML and JSON."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The text of `config.yaml`; parsing it gives an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with keys such as "model.path"."""
    if not isinstance(tree, Mapping):
        return {prefix: tree} if prefix else {}
    parts = (flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for part in parts for key, value in part.items()}
