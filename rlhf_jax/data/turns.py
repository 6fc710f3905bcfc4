"""The turns of the assistant in a conversation, as parts of its rendered text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.data.chat import Chat, Message, turns_of, without_prompt
from rlhf_jax.data.examples import fault_at, place_of
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Conversation(NamedTuple):
    """A conversation as text.

    Attributes:
      parts: consecutive texts, each with whether the assistant wrote it.
      is_answered: whether the last turn is the assistant's.
    """

    parts: list[tuple[str, bool]]
    is_answered: bool


def conversation_of(
    example: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerFast
) -> Conversation:
    """The conversation in `messages`, or of a prompt and its completion.

    The chat template marks the assistant's texts by {% generation %}. In a template without such
    marks they are, of each turn of the assistant,

        the text of the messages up to this turn - the text before it, with a generation prompt

    without the white space after an end-of-turn token. Turns of a prompt are not the assistant's.

    Raises:
      InputError: the example has no messages, or none of the assistant, or the text of a part of
        them is not the beginning of the full text.
    """
    prompt, completion = example.get("prompt"), example.get("completion", example.get("messages"))
    if completion is None or (isinstance(prompt or "", str) and isinstance(completion, str)):
        raise fault_at(
            place_of(example, number),
            " has text and no turns: set data.assistant_turns to last, or give it messages.",
        )
    before = turns_of(prompt or "", "user")
    after = without_prompt(turns_of(completion, "assistant"), before)
    chat = Chat.of(example, number, tokenizer)
    if all(message["role"] != "assistant" for message in after):
        raise InputError(
            f"The messages of {chat.place} have no turn of 'assistant', and data.assistant_turns "
            "all is to train on those: drop the example, or give it an answer."
        )
    text, spans = _spans(chat, before, after)
    parts, end = [], 0
    for start, stop in spans:
        parts += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    parts.append((text[end:], False))
    return Conversation([part for part in parts if part[0]], after[-1]["role"] == "assistant")


def _spans(
    chat: Chat, before: list[Message], after: list[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of all messages, and where the assistant wrote it after the prompt."""
    messages = [*before, *after]
    text = chat.up_to_eos(messages)
    if (marked := chat.marked(messages)) is None:
        return text, list(_derived_spans(chat, messages, len(before), text))
    first = len(os.path.commonprefix([text, chat.rendered(before)])) if before else 0
    spans = [(start, min(stop, len(text))) for start, stop in marked[1] if start >= first]
    if marked[0][: len(text)] != text or not any(stop > start for start, stop in spans):
        raise InputError(
            f"The chat template marks no turn of the assistant in the messages of {chat.place} "
            "by {% generation %}: use another tokenizer.chat_template."
        )
    return text, spans


def _derived_spans(
    chat: Chat, messages: list[Message], first: int, text: str
) -> Iterator[tuple[int, int]]:
    """The spans of the assistant's turns from message `first` on, by beginnings of the messages."""
    end = 0
    for index, message in enumerate(messages[first:], first):
        if message["role"] != "assistant":
            continue
        head = chat.rendered(messages[:index], add_generation_prompt=True)
        turn = chat.up_to_eos(messages[: index + 1])
        if not (text.startswith(turn) and turn.startswith(head) and len(head) >= end):
            raise InputError(
                f"The chat template renders turn {index + 1} of {chat.place} differently without "
                "the turns after it, or its beginning differently from a generation prompt, so "
                "the text of the turn is unknown: set data.assistant_turns to last, or use a "
                "tokenizer.chat_template with {% generation %} marks."
            )
        end = len(turn)
        yield len(head), end
