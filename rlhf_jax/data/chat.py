"""Messages as text: conversations through the tokenizer's chat template.

A prompt, a completion or a judged response may be a list of messages, {"role": ..., "content": ...}
each, instead of a text. The model then reads and writes the text that the template renders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]


def are_messages(value: Any) -> bool:
    """Whether a value is a list of one or more messages."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def contents(value: Any) -> str:
    """A text itself; the contents of messages, a line each; the empty text for None."""
    if isinstance(value, list):
        return "\n".join(message["content"] for message in value)
    return value or ""


def prompt_text(example: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The prompt of an example, or its entire `text`; messages get a generation prompt.

    Raises:
      InputError: the messages cannot be rendered, or end with the assistant's turn.
    """
    prompt = example["prompt"] if "prompt" in example else example["text"]
    if isinstance(prompt, str):
        return prompt
    if prompt[-1]["role"] == "assistant":
        raise InputError(
            f"The prompt of row {number} ends with a turn of 'assistant': end it with the turn "
            "that is to be answered."
        )
    return _apply(prompt, number, tokenizer, add_generation_prompt=True)


def completion_texts(
    prompt: Any, completion: Any, number: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, str]:
    """(prompt, completion) as texts; a text beside messages is one turn of the user or assistant.

    Raises:
      InputError: the messages cannot be rendered in two parts.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    before, after = _turns(prompt, "user"), _turns(completion, "assistant")
    return _render(before, _without(before, after), number, tokenizer)


def response_texts(
    prompt: Any, responses: Sequence[Any], number: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[str]] | None:
    """(prompt, responses) as texts, for several responses to one prompt.

    Responses of messages may begin with those of the prompt. Without a prompt each is a full
    conversation: its last turn is the response, its other turns are the prompt.

    Returns:
      The texts; None for conversations that differ before their last turn, or have one turn only.

    Raises:
      InputError: the messages cannot be rendered in two parts.
    """
    if all(isinstance(text, str) for text in (prompt, *responses)):
        return prompt, list(responses)
    if not responses:
        return None
    turns = [_turns(response, "assistant") for response in responses]
    before = _turns(prompt, "user")
    if not before:
        before = turns[0][:-1]
        if not before or any(not _same(each[:-1], before) for each in turns):
            return None
    parts = [_render(before, _without(before, each), number, tokenizer) for each in turns]
    return parts[0][0], [response for _, response in parts]


def text_parts(
    example: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerFast, last_turn: bool
) -> tuple[str | None, str]:
    """(prompt, completion) of an example of the kind "text"; the prompt of a single text is None.

    A conversation is split before the last turn if only that is a target, else it is one text.

    Raises:
      InputError: the messages cannot be rendered, or not in two parts.
    """
    if "completion" in example:
        return completion_texts(example["prompt"], example["completion"], number, tokenizer)
    if "messages" not in example:
        return None, example["text"]
    messages = example["messages"]
    if not last_turn:
        return None, _up_to_eos(messages, number, tokenizer)
    _check_template(tokenizer)
    if messages[-1]["role"] != "assistant":
        raise InputError(
            f"The messages of row {number} end with a turn of {messages[-1]['role']!r}: with "
            "data.completion_only the model is trained on the last turn, which has to be the "
            "assistant's."
        )
    advice = "set data.completion_only to false"
    return _render(messages[:-1], messages[-1:], number, tokenizer, advice)


def _turns(value: Any, role: str) -> list[Message]:
    """Messages unchanged, a text as one message, an empty text as no message."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    return value


def _same(first: Sequence[Message], second: Sequence[Message]) -> bool:
    """Whether roles and contents are equal; files may fill other keys with nulls."""
    return [(m["role"], m["content"]) for m in first] == [(m["role"], m["content"]) for m in second]


def _without(before: list[Message], turns: list[Message]) -> list[Message]:
    """The turns of a response without those of its prompt, if it begins with them."""
    begins = len(turns) > len(before) and _same(turns[: len(before)], before)
    return turns[len(before) :] if begins else turns


def _render(
    before: list[Message],
    after: list[Message],
    number: int,
    tokenizer: PreTrainedTokenizerFast,
    advice: str = "use another tokenizer.chat_template",
) -> tuple[str, str]:
    """The rendered prompt, and the text that the template adds for the turns that answer it."""
    full = _up_to_eos([*before, *after], number, tokenizer)
    prompt = _apply(before, number, tokenizer, add_generation_prompt=True)
    if not full.startswith(prompt):
        raise InputError(
            f"The chat template renders the messages of row {number} differently without their "
            f"last turn, so the text of that turn is unknown: {advice}."
        )
    return prompt, full[len(prompt) :]


def _up_to_eos(messages: list[Message], number: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text without the line break that many templates write after the last EOS."""
    text = _apply(messages, number, tokenizer)
    stripped = text.rstrip()
    return stripped if stripped.endswith(tokenizer.eos_token) else text


def _apply(
    messages: list[Message], number: int, tokenizer: PreTrainedTokenizerFast, **options: bool
) -> str:
    import jinja2

    _check_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"The chat template cannot render the messages of row {number}: {reason}."
        ) from error
    return str(text)


def _check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.chat_template is None:
        raise InputError(
            "The data have messages, but the tokenizer has no chat template: use a tokenizer with "
            "one, give one as tokenizer.chat_template, or use data with prompt and completion."
        )
