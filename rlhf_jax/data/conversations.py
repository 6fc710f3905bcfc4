"""Examples whose prompt is part of another text: conversations, and prompts with a fixed suffix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.data.encoding import warn
from rlhf_jax.data.formats import Example, Kind
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError

RESPONSES = ("completion", "chosen", "rejected")


def split_conversations(
    examples: Sequence[Example],
    kind: Kind,
    settings: DataSettings,
    path: str,
    *,
    quiet: bool = False,
) -> list[Example]:
    """Splits conversations into prompt and response, by `split_at` and `prompt_suffix`.

    Args:
      examples: with canonical column names.
      kind: "text", "pairs", "rankings", "prompts" or "references".
      settings: the section `data`.
      path: the source of the examples, for messages.
      quiet: whether to skip the warning, for a second pass over the same examples.

    Raises:
      InputError: no example is left, or an example has messages where a text is to be split.
    """
    split = list(examples)
    if settings.split_at is not None:
        split = _split_all(examples, kind, settings.split_at, path, quiet)
    if settings.prompt_suffix is not None:
        suffix = settings.prompt_suffix.strip()
        split = [_with_suffix_in_prompt(example, suffix) for example in split]
    return split


def _split_all(
    examples: Sequence[Example], kind: Kind, mark: str, path: str, quiet: bool
) -> list[Example]:
    """The examples that can be split at the mark; one warning for the others."""
    found = [_split(example, number, kind, mark) for number, example in enumerate(examples, 1)]
    split = [example for example in found if example is not None]
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
            f"No row of {path} can be split: none has data.split_at ({mark!r}){reason}."
        )
    return split


def _split(example: Example, number: int, kind: Kind, mark: str) -> Example | None:
    """The example with a prompt of its own; None if it cannot be split."""
    if example.get("prompt"):
        return example
    if kind == "rankings":
        parts = [_split_text(text, number, mark) for text in example["responses"]]
        prompt = _shared_prompt(parts)
        responses = [response for _, response in parts]
        return prompt and {**example, "prompt": prompt, "responses": responses}
    if kind == "pairs":
        parts = [_split_text(example[name], number, mark) for name in ("chosen", "rejected")]
        prompt = _shared_prompt(parts)
        return prompt and {
            **example,
            "prompt": prompt,
            "chosen": parts[0][1],
            "rejected": parts[1][1],
        }
    return _split_single(example, number, mark)


def _split_single(example: Example, number: int, mark: str) -> Example | None:
    """A text as prompt and completion; a chosen conversation as prompt and chosen response.

    The columns of a file of conversations then have the same meaning as those of a file with
    separate prompts.
    """
    source = next(name for name in ("text", "messages", "chosen", "prompt") if name in example)
    prompt, response = _split_text(example[source], number, mark)
    if not prompt:
        return None
    if source != "chosen":
        rest = {name: value for name, value in example.items() if name != source}
        return {**rest, "prompt": prompt, "completion": response}
    other = example.get("rejected")
    if isinstance(other, str) and other.startswith(prompt):
        example = {**example, "rejected": other[len(prompt) :]}
    return {**example, "prompt": prompt, "chosen": response}


def _split_text(text: Any, number: int, mark: str) -> tuple[str, str]:
    """(text up to the end of the last mark, text after it); the first is empty without a mark."""
    if not isinstance(text, str):
        raise InputError(
            f"Row {number} holds messages, which have turns already: leave out data.split_at "
            f"({mark!r}), which splits texts."
        )
    head, found, tail = text.rpartition(mark)
    return head + found, tail


def _shared_prompt(parts: Sequence[tuple[str, str]]) -> Any:
    """The first part, if all have the same; None if they differ or are empty."""
    prompts = {prompt for prompt, _ in parts}
    return (prompts.pop() or None) if len(prompts) == 1 else None


def _with_suffix_in_prompt(example: Example, suffix: str) -> Example:
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
        if not space:
            return example
        return _map_responses(example, lambda text: space + text) | {"prompt": stripped}
    texts = [example[name] for name in RESPONSES if name in example]
    texts += example.get("responses", ())
    if texts and all(isinstance(text, str) and text.startswith(suffix) for text in texts):
        line = f"{stripped}\n{suffix}" if stripped else suffix
        return _map_responses(example, lambda text: text[len(suffix) :]) | {"prompt": line}
    return example


def _map_responses(example: Example, function: Callable[[str], str]) -> Example:
    """The example with the function applied to all responses that are texts."""

    def changed(response: Any) -> Any:
        return function(response) if isinstance(response, str) else response

    responses = {name: changed(example[name]) for name in RESPONSES if name in example}
    if "responses" in example:
        responses["responses"] = [changed(response) for response in example["responses"]]
    return {**example, **responses}
