"""Text in, text out: responses to prompts by a trained model, and the command `generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.chat import prompt_text
from rlhf_jax.data.datasets import Settings as DataSettings
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.constraints import padded_batch_size
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import check_batch_size, check_heads
from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.settings import GenerationSettings
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.config import GenerateConfig, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def sampler(
    model: Model, tokenizer: PreTrainedTokenizerFast, settings: GenerationSettings
) -> Callable[[Params, PromptBatch, jax.Array], Rollout]:
    """A pure (params, batch, key) -> Rollout that samples as the section `generation` says."""

    def sample(params, batch, key):
        return generate(
            model,
            params,
            batch.prompts,
            batch.prompt_mask,
            key,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            stop_token_ids=(tokenizer.eos_token_id,),
            min_new_tokens=settings.min_new_tokens,
        )

    return sample


class Responder:
    """Answers prompts with a model; one compiled program for all batches of a call.

    Args:
      model, tokenizer: which must belong together.
      settings: the section `generation`.
      prompt_suffix: of the section `data`: before it prompts are cut that are too long.

    Raises:
      InputError: the response alone would fill all positions of the model.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        settings: GenerationSettings,
        prompt_suffix: str | None = None,
    ) -> None:
        room = model.config.n_positions - settings.max_new_tokens
        if room < 1:
            raise InputError(
                f"generation.max_new_tokens = {settings.max_new_tokens} leaves no room for a "
                f"prompt in the model's n_positions = {model.config.n_positions}; shorten it."
            )
        self.tokenizer, self.batch_size = tokenizer, settings.batch_size
        self.data = DataSettings(max_prompt_length=room, prompt_suffix=prompt_suffix)
        self._respond = jax.jit(sampler(model, tokenizer, settings))

    def __call__(self, params: Params, prompts: Sequence[str], key: jax.Array) -> list[str]:
        """One response to each prompt, without EOS; long prompts are cut as in PPO."""
        return [text for batch in self.batches(params, prompts, key) for text in batch]

    def batches(
        self, params: Params, prompts: Sequence[str], key: jax.Array
    ) -> Iterator[list[str]]:
        """The responses, batch by batch as they are ready."""
        rows = encode_prompts([{"prompt": prompt} for prompt in prompts], self.tokenizer, self.data)
        batch_size = min(self.batch_size, padded_batch_size(len(prompts)))
        for index, batch in enumerate(eval_batches(rows, batch_size)):
            rollout = self._respond(params, batch, jax.random.fold_in(key, index))
            texts = decode(self.tokenizer, rollout.tokens, rollout.mask)
            yield texts[: len(prompts) - index * batch_size]


def decode(tokenizer: PreTrainedTokenizerFast, tokens: Any, mask: Any) -> list[str]:
    """The texts of i32[B, T] tokens under bool[B, T], without special tokens; all hosts call it."""
    tokens, mask = (np.asarray(array) for array in hosts.to_host((tokens, mask)))
    rows = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
    return tokenizer.batch_decode(
        rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def run_generate(config: GenerateConfig | str | Mapping[str, Any]) -> int:
    """Writes one JSON object per prompt, {"prompt", "response"}, to `output` or standard output.

    Returns:
      The number of responses.

    Raises:
      InputError: there is no model, no prompt, or the output cannot be written.
    """
    config = resolve(GenerateConfig, config)
    if config.model.path is None:
        raise InputError("generate needs a model: give --model.path a folder or hub name.")
    tokenizer = assemble.choose_tokenizer(config.tokenizer, config.model.path, list)
    key = jax.random.key(config.seed)
    mesh = make_mesh(config.mesh)
    model, params = assemble.load_model(config.model, tokenizer, key, mesh)
    check_heads(mesh, model.config.n_head)
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
    rows = held_out or train
    return [prompt_text(row, number, tokenizer) for number, row in enumerate(rows, 1)]
