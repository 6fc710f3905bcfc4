"""Messages as text: conversations through the tokenizer's chat template.

A prompt, a completion or a judged response may be a list of messages, {"role": ..., "content": ...}
each, instead of a text. The model then reads and writes the text that the template renders. The
content may be a list of parts, {"type": "text", "text": ...} each, or null beside `tool_calls`; an
example may have `tools`, a list of JSON schemas or JSON of one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_jax.data.examples import fault_at, place_of
from rlhf_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]
MAX_SECONDS = 10.0  # for one rendering, which usually is far below a millisecond


def are_messages(value: Any) -> bool:
    """Whether a value is a list of one or more messages."""
    return isinstance(value, list) and len(value) > 0 and all(map(_is_message, value))


def _is_message(turn: Any) -> bool:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    if content is None:
        return bool(turn.get("tool_calls"))
    return isinstance(content, str) or (isinstance(content, list) and all(map(_is_text, content)))


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def contents(value: Any) -> str:
    """A text itself; the contents of messages, a line each; the empty text for None."""
    if isinstance(value, list):
        return "\n".join(_plain(message)["content"] for message in value)
    return value or ""


def _plain(message: Message) -> Message:
    """The message with a text as content, and without the nulls by which files fill columns."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    return {**{k: v for k, v in message.items() if v is not None}, "content": content}


def prompt_text(example: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The prompt of an example; else its messages without the last answer, or its `text`.

    Messages get a generation prompt.

    Raises:
      InputError: the messages cannot be rendered, or a prompt ends with the assistant's turn.
    """
    prompt = example.get("prompt", example.get("text"))
    if isinstance(prompt, str):
        return prompt
    chat = Chat.of(example, number, tokenizer)
    if prompt is None:
        turns = example["messages"]
        prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        return chat.rendered(prompt, add_generation_prompt=True) if prompt else ""
    if prompt[-1]["role"] == "assistant":
        raise InputError(
            f"The prompt of {chat.place} ends with a turn of 'assistant': end it with the turn "
            "that is to be answered."
        )
    return chat.rendered(prompt, add_generation_prompt=True)


def text_parts(
    example: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerFast, last_turn: bool
) -> tuple[str | None, str]:
    """(prompt, completion) of an example of the kind "text"; the prompt of a single text is None.

    A conversation is split before the last turn if only that is a target, else it is one text. A
    text beside messages is one turn, of the user or of the assistant.

    Raises:
      InputError: the messages cannot be rendered, or not in two parts.
    """
    prompt, completion = example.get("prompt"), example.get("completion")
    if completion is None and "messages" not in example:
        return None, example["text"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    chat = Chat.of(example, number, tokenizer)
    if completion is not None:
        return chat.parts(turns_of(prompt, "user"), turns_of(completion, "assistant"))
    messages = example["messages"]
    if not last_turn:
        return None, chat.up_to_eos(messages)
    if messages[-1]["role"] != "assistant":
        raise InputError(
            f"The messages of {chat.place} end with a turn of {messages[-1]['role']!r}: with "
            "data.completion_only the model is trained on the last turn, which has to be the "
            "assistant's."
        )
    return chat.parts(messages[:-1], messages[-1:], "set data.completion_only to false")


def response_texts(
    example: Mapping[str, Any],
    responses: Sequence[Any],
    number: int,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[str, list[str]] | None:
    """(prompt, responses) as texts, for several responses to one prompt.

    Responses of messages may begin with those of the prompt. Without a prompt each is a full
    conversation: its last turn is the response, its other turns are the prompt.

    Returns:
      The texts; None for conversations that differ before their last turn, or have one turn only.

    Raises:
      InputError: the messages cannot be rendered in two parts.
    """
    prompt = example.get("prompt", "")
    if all(isinstance(text, str) for text in (prompt, *responses)):
        return prompt, list(responses)
    if not responses:
        return None
    turns = [turns_of(response, "assistant") for response in responses]
    before = turns_of(prompt, "user")
    if not before:
        before = turns[0][:-1]
        if not before or any(not _same(each[:-1], before) for each in turns):
            return None
    chat = Chat.of(example, number, tokenizer)
    parts = [chat.parts(before, each) for each in turns]
    return parts[0][0], [response for _, response in parts]


def turns_of(value: Any, role: str) -> list[Message]:
    """Messages unchanged, a text as one message, an empty text as no message."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    return value


def without_prompt(after: list[Message], before: list[Message]) -> list[Message]:
    """The turns of a completion without those of its prompt, which it may begin with."""
    repeats = len(after) > len(before) and _same(after[: len(before)], before)
    return after[len(before) :] if repeats else after


def _same(first: Sequence[Message], second: Sequence[Message]) -> bool:
    """Whether roles, contents and calls are equal; messages may have further keys."""
    one, other = (
        [(m["role"], m["content"], m.get("tool_calls")) for m in map(_plain, turns)]
        for turns in (first, second)
    )
    return one == other


class Chat(NamedTuple):
    """The chat template with the tools of an example, which stands at `place`."""

    tokenizer: PreTrainedTokenizerFast
    tools: Any
    place: str

    @classmethod
    def of(
        cls, example: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerFast
    ) -> Chat:
        place, tools = place_of(example, number), example.get("tools") or None
        if tokenizer.chat_template is None:
            raise InputError(
                "The data have messages, but the tokenizer has no chat template: use a tokenizer "
                "with one, give one as tokenizer.chat_template, or use data with prompt and "
                "completion."
            )
        try:
            tools = json.loads(tools) if isinstance(tools, str) else tools
        except (ValueError, RecursionError) as error:
            raise fault_at(place, f": column 'tools' is no JSON: {error}.") from error
        if tools is not None and not isinstance(tools, list):
            raise fault_at(place, f": column 'tools' holds {str(tools)[:40]}, no list of schemas.")
        return cls(tokenizer, tools, place)

    def parts(
        self,
        before: list[Message],
        after: list[Message],
        advice: str = "use another tokenizer.chat_template",
    ) -> tuple[str, str]:
        """The rendered prompt, and the text that the template adds for the turns that answer it.

        Turns that begin with those of the prompt are read without them.
        """
        full = self.up_to_eos([*before, *without_prompt(after, before)])
        prompt = self.rendered(before, add_generation_prompt=True)
        if not full.startswith(prompt):
            raise InputError(
                f"The chat template renders the messages of {self.place} differently without their "
                f"last turn, so the text of that turn is unknown: {advice}."
            )
        return prompt, full[len(prompt) :]

    def up_to_eos(self, messages: list[Message]) -> str:
        """The text without the line break that many templates write after an end-of-turn token."""
        text = self.rendered(messages)
        stripped = text.rstrip()
        if len(stripped) == len(text) or not stripped.endswith(special_tokens(self.tokenizer)):
            return text
        return stripped

    def rendered(self, messages: list[Message], **options: bool) -> str:
        """The text of the messages; a template may raise any error, and may be endless."""
        render = self.tokenizer.apply_chat_template
        text = self._call(render, messages, tools=self.tools, tokenize=False, **options)
        return str(text)

    def marked(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]] | None:
        """The text, and the spans in it that the template marks as written by the assistant.

        None if the template has no {% generation %}. The spans are those of transformers'
        `return_assistant_tokens_mask`.
        """
        template = self.tokenizer.get_chat_template(None, self.tools)
        if not re.search(r"{%-?\s*generation\s*-?%}", template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = self._call(
            lambda turns, **options: render_jinja_template([turns], **options),
            messages,
            tools=self.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0]

    def _call(self, render: Callable[..., Any], messages: list[Message], **options: Any) -> Any:
        """render(messages, ...), with the example's place in its errors."""
        template = str(self.tokenizer.chat_template)
        uses_calls = any(message.get("tool_calls") for message in messages)
        for name, is_used in (("tools", self.tools is not None), ("tool_calls", uses_calls)):
            if is_used and name not in template:
                raise fault_at(
                    self.place,
                    f" has {name}, which the chat template does not render: use another "
                    "tokenizer.chat_template.",
                )
        variables = getattr(self.tokenizer, "chat_template_kwargs", {})
        try:
            with _time_limit(MAX_SECONDS):
                return render([_plain(message) for message in messages], **options, **variables)
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise InputError(
                f"The chat template cannot render the messages of {self.place}: {reason}."
            ) from error


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """The tokens that the tokenizer marks as special, such as those that end a turn."""
    return _special_tokens(tokenizer, len(tokenizer), tokenizer.eos_token)


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any, size: int, eos: str | None) -> tuple[str, ...]:
    """Kept for each tokenizer of a size and EOS token: with many tokens this takes milliseconds."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return (*tokenizer.all_special_tokens, *added)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError after these seconds, where signals allow it: in the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds:.0f} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *timer)
