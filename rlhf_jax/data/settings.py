"""The sections `data` and `tokenizer` of the configuration; nothing here imports jax."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any, Literal

from rlhf_jax.checks import Limit, NonNegativeInt, PositiveInt, TwoOrMore, check_fields
from rlhf_jax.data import tasks
from rlhf_jax.data.formats import CANONICAL
from rlhf_jax.errors import InputError

BUILTIN = "builtin"
MAX_BUCKETS = 4
Buckets = Annotated[int, Limit(lambda x: 1 <= x <= MAX_BUCKETS, f"be from 1 to {MAX_BUCKETS}")]
MIN_VOCABULARY = 258  # 256 bytes and the two special tokens
# The arguments of transformers' `apply_chat_template` and of templates that the program sets.
RESERVED_TEMPLATE_KWARGS = (
    "add_generation_prompt", "additional_special_tokens", "bos_token", "chat_template",
    "cls_token", "continue_final_message", "conversation", "eos_token", "extra_special_tokens",
    "mask_token", "max_length", "messages", "pad_token", "padding", "return_assistant_tokens_mask",
    "return_dict", "return_tensors", "sanitize_control_tokens", "sep_token", "tokenize",
    "tokenizer_kwargs", "tools", "truncation", "unk_token",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The section `data` of the configuration.

    Attributes:
      path: "builtin" for the embedded corpus; "task:NAME" for a task with answers that can be
        verified: arithmetic, calculator, countdown, guessing, larger, letters or sorting;
        "reasoning_gym:NAME" for one of the package reasoning-gym; a file .jsonl, .json, .csv (each
        also with .gz) or .parquet; a folder of such files; or the name of a data set on the hub. An
        empty cell of a CSV file is the empty text.
      name: configuration of a data set on the hub.
      split: training split. A file is the split "train"; in a folder, files named after a split
        (train.jsonl, train-00000.parquet) are that split, or all are "train" if none is named so.
        Slices of the `datasets` library ("train[:80%]") are supported.
      eval_path: path of the evaluation examples, if it is not `path`.
      eval_split: split of the evaluation examples; by default "train" of a file, "validation" of a
        folder or a hub data set.
      eval_rows: number of evaluation examples. With neither `eval_path` nor `eval_split`, exactly
        this number is held out from the end of a shuffle by `seed`; otherwise these are the first
        examples of the evaluation split, at most this number. None means 512, or a tenth of the
        examples if that is fewer. 0 means none.
      max_rows: maximum number of training examples, the first of the same shuffle.
      columns: canonical column name -> name in the file.
      seed: of the embedded corpus, of the hold-out and of `prompt_tokens`.
      builtin_rows: number of training examples of the embedded corpus or of a task.
      task: options of the task, such as {digits: 3, noise: 0.2}; docs/tasks.md has those of each.
      max_length: maximum tokens of a text, prompt and completion together, EOS included.
      max_prompt_length: maximum tokens of a prompt; longer prompts lose their left end.
      max_response_length: maximum tokens of a completion or judged response, EOS included; longer
        ones lose their right end.
      completion_only: compute the loss on the completion of a prompt only (the last turn of
        messages), not on the prompt.
      assistant_turns: the targets of a conversation in messages, with `completion_only`: the "last"
        turn, or "all" turns of the assistant, each with its end-of-turn token (of a prompt with a
        completion, those of the completion). With "all", only `max_length` limits a conversation.
      packing: pack several short texts into one sequence.
      length_buckets: maximum number of different batch widths, 1 to 4; each is compiled once. With
        more than one, padding that no example of a batch needs is removed.
      prompt_tokens: for prompts that are full texts: keep the first n tokens, n drawn uniformly
        from this closed range by (seed, index of the example).
      split_at: splits texts that are full conversations after the last occurrence of this string,
        for example "\\n\\nAssistant:", into prompt and response. Examples that have a prompt are
        not split. Examples without the string are dropped, and pairs whose prompts differ.
      prompt_suffix: ending of the prompts, for example "TL;DR:". Prompts that are too long then
        lose the right end of the text before it. If the responses begin with it, it is moved to
        the prompt, on a line of its own.
      min_response_words: pairs with a response of fewer words are dropped; in rankings, only the
        response is dropped.

    Raises:
      InputError: naming the invalid setting and the allowed values.
    """

    path: str = BUILTIN
    name: str | None = None
    split: str = "train"
    eval_path: str | None = None
    eval_split: str | None = None
    eval_rows: NonNegativeInt | None = None
    max_rows: PositiveInt | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: NonNegativeInt = 0
    builtin_rows: PositiveInt = 4096
    task: dict[str, Any] = dataclasses.field(default_factory=dict)
    # A text with a target has two tokens, a response at least a token and EOS.
    max_length: TwoOrMore = 256
    max_prompt_length: PositiveInt = 128
    max_response_length: TwoOrMore = 128
    completion_only: bool = True
    assistant_turns: Literal["last", "all"] = "last"
    packing: bool = True
    length_buckets: Buckets = 1
    prompt_tokens: tuple[int, int] | None = None
    split_at: str | None = None
    prompt_suffix: str | None = None
    min_response_words: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields("data", self)
        for key, text in (("split_at", self.split_at), ("prompt_suffix", self.prompt_suffix)):
            if text is not None and not text.strip():
                raise InputError(f"data.{key} is empty: give it a text, or leave it out (null).")
        if not self.path.strip() or not self.split.strip():
            raise InputError(
                'data.path and data.split must not be empty: for example "builtin" and "train".'
            )
        self._check_prompt_tokens()
        self._check_assistant_turns()
        self._check_builtin()
        for canonical in self.columns:
            if canonical not in CANONICAL:
                raise InputError(
                    f"data.columns maps {canonical!r}, which is not a known column: the left side "
                    f"is one of {', '.join(CANONICAL)}, the right side a name in the file."
                )

    def _check_prompt_tokens(self) -> None:
        bounds, limit = self.prompt_tokens, self.max_prompt_length
        if bounds is not None and (len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= limit):
            raise InputError(
                f"data.prompt_tokens is {bounds}: give (low, high) with 1 <= low <= high <= "
                f"data.max_prompt_length ({limit})."
            )

    def _check_assistant_turns(self) -> None:
        if self.assistant_turns == "all" and not self.completion_only:
            raise InputError(
                "data.assistant_turns is all, but without data.completion_only all tokens are "
                "targets: leave one of the two out."
            )

    def _check_builtin(self) -> None:
        for path in filter(tasks.is_task, (self.path, self.eval_path or "")):
            tasks.options_of(path, self.task)
        if self.task and not tasks.is_task(self.path):
            raise InputError(
                f"data.task has options of a task, but data.path is {self.path!r}: give it a path "
                "such as task:arithmetic, or leave the options out."
            )
        if self.path != BUILTIN and not tasks.is_task(self.path):
            return
        if self.split != "train" or self.name is not None:
            raise InputError(
                "data.split and data.name select a part of a file or of a hub data set; the path "
                f'"{self.path}" has no parts: leave them out.'
            )
        if self.eval_split is not None and self.eval_path is None:
            raise InputError(
                "data.eval_split needs data.eval_path here: the embedded corpus and the tasks make "
                "their own evaluation examples (data.eval_rows)."
            )


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The section `tokenizer` of the configuration.

    Attributes:
      path: folder or hub name of a tokenizer. None trains one on the training texts.
      vocab_size: maximum number of entries of a trained tokenizer, its two special tokens included;
        a small corpus may give fewer.
      chat_template: Jinja template that renders messages as text, or a file with one; it replaces
        the tokenizer's own.
      chat_template_kwargs: further variables of the template, such as {enable_thinking: false} of
        Qwen3's.

    Raises:
      InputError: if `vocab_size` cannot hold every byte and the special tokens, the template is
        neither a file nor a Jinja template, or a variable is one that the program gives to
        templates.
    """

    path: str | None = None
    vocab_size: int = 1024
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCABULARY:
            raise InputError(
                f"tokenizer.vocab_size is {self.vocab_size}, but a byte-level vocabulary needs at "
                f"least {MIN_VOCABULARY} entries: set it higher."
            )
        if self.path is not None and not self.path.strip():
            raise InputError(
                "tokenizer.path is empty: give a folder or a hub name, or leave it out (null) to "
                "train a tokenizer on the data."
            )
        if self.chat_template is not None and "{" not in self.chat_template:
            file = os.path.expanduser(self.chat_template)
            if not os.path.isfile(file):
                raise InputError(
                    f"tokenizer.chat_template {self.chat_template!r} is neither a file nor a Jinja "
                    "template, which has {{ }} or {% %} in it."
                )
        for name in self.chat_template_kwargs:
            if name in RESERVED_TEMPLATE_KWARGS:
                raise InputError(
                    f"tokenizer.chat_template_kwargs has {name!r}, which the program gives to the "
                    "template itself: leave it out, or use another tokenizer.chat_template."
                )
