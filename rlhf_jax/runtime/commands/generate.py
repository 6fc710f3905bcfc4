"""The command `generate`: responses to prompts, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
    tokenizer = loading.choose_tokenizer(config.tokenizer, config.model.path, list)
    key = jax.random.key(config.seed)
    mesh = make_mesh(config.mesh)
    model, params = loading.load_model(config.model, tokenizer, key, mesh)
    model.check_mesh(mesh)
    check_batch_size(mesh, "generation.batch_size", config.generation.batch_size)
    responder = Responder(model, tokenizer, config.generation, config.data.prompt_suffix)
    prompts = _prompts(config, tokenizer)
    lines = _lines(responder, mesh, params, prompts, key)
    if config.output is None:
        sys.stdout.writelines(lines)
        return len(prompts)
    output = epath.Path(config.output)
    try:
        with output.open("w") as file:
            file.writelines(lines)
    except OSError as error:
        raise InputError(
            f"cannot write to {output}: {error.strerror or error}; give --output a file that can "
            "be written."
        ) from error
    return len(prompts)


def _lines(
    responder: Responder, mesh: Mesh, params: Params, prompts: Sequence[str], key: jax.Array
) -> Iterator[str]:
    """One line of JSON for each prompt, as the responses are ready."""
    with jax.set_mesh(mesh):
        texts = (text for batch in responder.batches(params, prompts, key) for text in batch)
        for prompt, response in zip(prompts, texts, strict=True):
            yield json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False) + "\n"


def _prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    train, held_out = load_examples(config.data, "prompts")
    examples = enumerate(held_out or train, 1)
    return [prompt_text(example, number, tokenizer) for number, example in examples]
