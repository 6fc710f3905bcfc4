"""Examples whose prompt is part of another text: conversations, and prompts with a fixed suffix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.data.encoding import warn
from rlhf_jax.data.examples import fault_at, place_of, with_columns
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError

Columns = dict[str, Any]
Examples = list[Columns]
RESPONSES = ("completion", "chosen", "rejected")


def split_conversations(
    examples: Sequence[Columns],
    kind: Kind,
    settings: DataSettings,
    path: str,
    *,
    quiet: bool = False,
) -> Examples:
    """Splits conversations into prompt and response, by `split_at` and `prompt_suffix`.

    `path` is the source of the examples, for messages; `quiet` skips the warning.

    Raises:
      InputError: no example is left, an example has messages where a text is to be split, or a
        prompt is to be read from a conversation that is not split.
    """
    split = list(examples)
    if settings.split_at is not None:
        split = _split_all(examples, kind, settings.split_at, path, quiet)
    if settings.prompt_suffix is not None:
        suffix = settings.prompt_suffix.strip()
        split = [_with_suffix_in_prompt(example, suffix) for example in split]
    if kind == "prompts" and any("prompt" not in each and "text" not in each for each in split):
        raise InputError(
            f"Of {path} the column `chosen` is read for its prompts, but holds texts: set "
            'data.split_at to the text before the responses (for example "\\n\\nAssistant:"), or '
            "name the column of prompts in data.columns."
        )
    return split


def _split_all(
    examples: Sequence[Columns], kind: Kind, mark: str, path: str, quiet: bool
) -> Examples:
    """The examples that can be split at the mark; one warning for the others."""
    parts = [_split(each, place_of(each, n), kind, mark) for n, each in enumerate(examples, 1)]
    split = [example for example in parts if example is not None]
    is_compared = kind in ("pairs", "rankings")
    if not quiet:
        reason = " in each of their texts, or differ before it" if is_compared else ""
        warn(
            len(examples) - len(split),
            len(examples),
            f"{'texts' if kind == 'text' else kind} of {path} were dropped because they do not "
            f"have data.split_at ({mark!r}){reason}.",
        )
    if examples and not split:
        reason = " in all of its texts, with the same text before it" if is_compared else ""
        raise InputError(
            f"No example of {path} can be split: none has data.split_at ({mark!r}){reason}."
        )
    return split


def _split(example: Columns, place: str, kind: Kind, mark: str) -> Columns | None:
    """The example with a prompt of its own; None if it cannot be split.

    The columns of a file of conversations then have the same meaning as those of a file with
    separate prompts.
    """
    if example.get("prompt"):
        return example
    if kind in ("pairs", "rankings"):
        is_pair = kind == "pairs"
        texts = [example["chosen"], example["rejected"]] if is_pair else example["responses"]
        parts = [_split_text(text, place, mark) for text in texts]
        if len({prompt for prompt, _ in parts}) != 1 or not parts[0][0]:
            return None
        responses = [response for _, response in parts]
        pair = dict(zip(("chosen", "rejected"), responses, strict=False))
        columns: dict[str, Any] = pair if is_pair else {"responses": responses}
        return with_columns(example, prompt=parts[0][0], **columns)
    texts = "text messages chosen prompt" if kind != "unpaired" else "completion"
    source = next(name for name in texts.split() if name in example)
    prompt, response = _split_text(example[source], place, mark)
    if not prompt:
        return None
    if source == "chosen":
        other = example.get("rejected")
        rejected = {"rejected": other.removeprefix(prompt)} if isinstance(other, str) else {}
        return with_columns(example, prompt=prompt, chosen=response, **rejected)
    split = with_columns(example, prompt=prompt, completion=response)
    if source not in ("prompt", "completion"):
        del split[source]
    return split


def _split_text(text: Any, place: str, mark: str) -> tuple[str, str]:
    """(text up to the end of the last mark, text after it); the first is empty without a mark."""
    if not isinstance(text, str):
        raise fault_at(
            place,
            " holds messages, which have turns already: leave out data.split_at "
            f"({mark!r}), which splits texts.",
        )
    head, separator, tail = text.rpartition(mark)
    return head + separator, tail


def _with_suffix_in_prompt(example: Columns, suffix: str) -> Columns:
    """The example with a prompt that ends with the suffix, if it is between prompt and responses.

    White space after the suffix is moved to the responses, and a suffix at the beginning of the
    responses is moved to the prompt, on a line of its own.
    """
    prompt = example.get("prompt")
    if not isinstance(prompt, str):
        return example
    stripped = prompt.rstrip()
    if stripped.endswith(suffix):
        space = prompt[len(stripped) :]
        return with_columns(_map_responses(example, lambda text: space + text), prompt=stripped)
    names = [name for name in RESPONSES if name in example]
    texts = [*(example[name] for name in names), *example.get("responses", ())]
    if texts and all(isinstance(text, str) and text.startswith(suffix) for text in texts):
        line = f"{stripped}\n{suffix}" if stripped else suffix
        return with_columns(_map_responses(example, lambda text: text[len(suffix) :]), prompt=line)
    return example


def _map_responses(example: Columns, function: Callable[[str], str]) -> Columns:
    """The example with the function applied to all responses that are texts."""
    ranked = example.get("responses", ())
    names = [name for name in RESPONSES if isinstance(example.get(name), str)]
    changed: dict[str, Any] = {name: function(example[name]) for name in names}
    if ranked:
        changed["responses"] = [function(r) if isinstance(r, str) else r for r in ranked]
    return with_columns(example, **changed)
