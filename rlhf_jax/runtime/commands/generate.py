"""The command `generate`: responses to prompts, as JSON lines."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jax.sharding import Mesh

from rlhf_jax.data.chat import prompt_text
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Params
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import check_batch_size
from rlhf_jax.runtime import loading
from rlhf_jax.runtime.config import GenerateConfig, resolve
from rlhf_jax.runtime.evaluation.responses import Responder
from rlhf_jax.runtime.run.folder import is_remote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Characters that a terminal obeys or that UTF-8 lacks; JSON has escapes for them.
_UNSAFE = re.compile("[\x7f-\x9f\ud800-\udfff]")


def run_generate(config: GenerateConfig | str | Mapping[str, object]) -> int:
    """Writes one JSON object per prompt, {"prompt", "response"}, to `output` or standard output.

    Returns:
      The number of responses.

    Raises:
      InputError: there is no model, no prompt, or the output cannot be written.
    """
    config = resolve(GenerateConfig, config)
    if config.model.path is None:
        raise InputError("generate needs a model: give --model.path a folder or hub name.")
    if config.prompt is not None and config.message is not None:
        raise InputError("prompt and message are both given: give one of them.")
    check_output(config.output)
    tokenizer = loading.choose_tokenizer(config.tokenizer, config.model.path, list)
    key = jax.random.key(config.seed)
    mesh = make_mesh(config.mesh)
    model, params = loading.load_model(config.model, tokenizer, key, mesh)
    check_batch_size(mesh, "generation.batch_size", config.generation.batch_size)
    data = config.data
    responder = Responder(
        model, tokenizer, config.generation, data.prompt_suffix, data.max_prompt_length
    )
    prompts = _prompts(config, tokenizer)
    write_lines(config.output, _entries(responder, mesh, params, prompts, key))
    return len(prompts)


def _entries(
    responder: Responder, mesh: Mesh, params: Params, prompts: Sequence[str], key: jax.Array
) -> Iterator[dict[str, str]]:
    """Each prompt with its response, as the responses are ready."""
    with jax.set_mesh(mesh):
        texts = (text for batch in responder.batches(params, prompts, key) for text in batch)
        for prompt, response in zip(prompts, texts, strict=True):
            yield {"prompt": prompt, "response": response}


def _prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    if config.message is not None:
        if tokenizer.chat_template is None:
            raise InputError(
                "message needs a chat template, which the tokenizer lacks: give one as "
                "tokenizer.chat_template, or the text as prompt."
            )
        turns = [{"role": "user", "content": config.message}]
        return [prompt_text({"prompt": turns}, 0, tokenizer)]
    train, held_out = load_examples(config.data, "prompts")
    examples = enumerate(held_out or train, 1)
    return [prompt_text(example, number, tokenizer) for number, example in examples]


REMEDY = "give --output a file that can be written"


def check_output(path: str | None, remedy: str = REMEDY) -> None:
    """Raises an InputError if the file, or standard output for None, cannot be written."""
    if path is not None and is_remote(epath.Path(path)):
        return
    try:
        if path is not None:
            with open(path, "ab") as file:
                _check(file.fileno())
        elif sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        else:
            _check(sys.stdout.fileno())
    except io.UnsupportedOperation:
        return  # standard output is no file, but an object in Python
    except OSError as error:
        raise _cannot_write(path, error, remedy) from error


def _check(descriptor: int) -> None:
    """Raises an OSError if no byte can be written: a device says so, a file by its disk."""
    os.write(descriptor, b"")
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and hasattr(os, "fstatvfs"):
        disk = os.fstatvfs(descriptor)
        if disk.f_blocks > 0 and disk.f_bfree == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_lines(path: str | None, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes each entry as a line of JSON when it comes, to a file in UTF-8 or to standard output.

    Where the encoding of standard output lacks a character, its JSON escape is written.

    Raises:
      InputError: it cannot be written.
    """
    try:
        if path is None:
            ascii_only = codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8"
            for entry in entries:
                sys.stdout.write(json_line(entry, ascii_only))
                sys.stdout.flush()
            return
        target = epath.Path(path)
        with target.open("w") if is_remote(target) else open(path, "w", encoding="utf-8") as file:
            file.writelines(map(json_line, entries))
    except BrokenPipeError:
        raise  # the reader, such as `head`, wants no more
    except OSError as error:
        if path is None:  # else the interpreter tries again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise _cannot_write(path, error) from error


def json_line(entry: Mapping[str, Any], ascii_only: bool = False) -> str:
    r"""A line of JSON without control characters.

    >>> json_line({"a": "\u00e9\x9b"}), json_line({"a": "\u00e9"}, ascii_only=True)
    ('{"a": "é\\u009b"}\n', '{"a": "\\u00e9"}\n')
    """
    text = json.dumps(entry, ensure_ascii=ascii_only)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def _cannot_write(path: str | None, error: OSError, remedy: str = REMEDY) -> InputError:
    name = "standard output" if path is None else path
    return InputError(f"cannot write to {name}: {error.strerror or error}; {remedy}.")
