"""YAML as the settings are read from it: within limits, and with an error in one sentence."""

from typing import Any

import yaml

from rlhf_jax.errors import InputError, shown

ADDRESSES = ("gs", "s3", "az", "hf")  # of object stores, as epath opens them


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, deep nesting, and aliases that unfold to very many values."""

    MAX_DEPTH, MAX_SIZE = 50, 100_000

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of nodes with all that is in them

    def compose_node(self, parent: Any, index: Any) -> Any:
        line, is_alias = self.peek_event().start_mark.line + 1, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > self.MAX_DEPTH:
            raise yaml.YAMLError(f"line {line} is nested more than {self.MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in _parts(node))
        elif id(node) not in self._sizes:
            raise yaml.YAMLError(f"line {line} has an alias of the value that it is part of")
        if self._sizes[id(node)] > self.MAX_SIZE:
            raise yaml.YAMLError(f"line {line} unfolds to more than {self.MAX_SIZE} values")
        return node


def _parts(node: Any) -> list[Any]:
    """The nodes in a node; of a mapping, keys and values, after a check that no key is repeated."""
    if not isinstance(node, yaml.MappingNode):
        return node.value if isinstance(node, yaml.SequenceNode) else []
    keys: dict[tuple[str, str], Any] = {}
    for key, _ in node.value:
        first = keys.setdefault((key.tag, str(key.value)), key)
        if first is not key:
            lines = [each.start_mark.line + 1 for each in (first, key)]
            raise yaml.YAMLError(
                f"the key {key.value!r} of line {lines[0]} is in line {lines[1]} too"
            )
    return [part for pair in node.value for part in pair]


def parsed_yaml(text: str) -> Any:
    """The content of a YAML document; a ValueError with the reason where it is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"a tag does not fit its value ({error})") from None
    except ValueError as error:  # a number or a date that cannot be
        raise ValueError(str(error).partition(";")[0]) from None


def read_yaml(path: str) -> Any:
    """The content of a YAML file; an InputError if it cannot be read, or is no YAML."""
    from etils import epath  # here, so that --help does without it

    checked_path("--config", path)
    try:
        text = epath.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"The configuration {path} cannot be read ({reason}); give --config a YAML file."
        ) from None
    try:
        return parsed_yaml(text)
    except ValueError as error:
        raise InputError(f"{path} is not valid YAML: {error}.") from None


def checked_path(key: str, value: Any) -> str:
    """A text, or "" for another value; an InputError for a path that cannot be opened."""
    text = str(value) if isinstance(value, str) else ""
    if key.rpartition(".")[2].endswith(("path", "dir", "output", "config")):
        scheme, separator, _ = text.partition("://")
        if "\0" in text:
            raise InputError(f"{key} is {shown(text)}, but a path has no NUL characters.")
        if separator and scheme not in ADDRESSES:
            names = ", ".join(f"{each}://" for each in ADDRESSES)
            local = "a path or hub name" if key.endswith("path") else "a local path"
            raise InputError(f"{key} is {text}: give {local}, or an address of {names}.")
    return text
