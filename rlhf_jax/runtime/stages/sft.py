"""The stage of supervised fine-tuning: `train_sft`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from rlhf_jax.data.batching import Batches
from rlhf_jax.data.chat import contents, prompt_text
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.sft import encode_texts
from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import save_pretrained
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel.distributed import join
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import batch_sharding, check_batch_size
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.commands.evaluate import perplexity
from rlhf_jax.runtime.config import SFTConfig, resolve
from rlhf_jax.runtime.evaluation.responses import Responder
from rlhf_jax.runtime.evaluation.teacher_forced import (
    TeacherForcedRouge,
    encode_completions,
    have_completions,
)
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages.supervised import SupervisedStage, check_micro_batches
from rlhf_jax.training import sft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train_sft(config: SFTConfig | str | Mapping[str, Any]) -> loop.StageResult:
    """Fine-tunes a language model on texts, or on completions of prompts.

    Args:
      config: an `SFTConfig`, a YAML file, or a nested dict.

    Returns:
      The run folder, and the last value of each metric.

    Raises:
      InputError: one sentence about what is wrong with the configuration or the data.
    """
    config = resolve(SFTConfig, config)
    join(config.distributed)
    return loop.run(lambda: SFTStage(config), config)


def check_sizes(config: SFTConfig, model: Model, mesh: Mesh) -> None:
    """Raises an InputError if rows exceed the model's positions, or batches miss the mesh.

    Likewise if its attention cannot drop what the model says.
    """
    assemble.check_positions(model, config.data.max_length, "data.max_length")
    model.check_mesh(mesh)
    if config.sft.dropout:
        model.check_dropout()
    check_micro_batches(mesh, "sft", config.sft)
    check_batch_size(mesh, "sft.eval_batch_size", config.sft.eval_batch_size)


def first_tokenizer(
    config: SFTConfig, rows: Sequence[Mapping[str, Any]] | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer that this stage starts from, or trains on its rows."""
    if rows is None:
        rows, _ = load_examples(config.data, "text", quiet=True)
    texts = (text_of(row) for row in rows)
    return assemble.choose_tokenizer(config.tokenizer, config.model.path, lambda: texts)


class SFTStage(SupervisedStage):
    """What the loop needs of supervised fine-tuning; see `loop.Stage`."""

    name = "sft"

    def __init__(self, config: SFTConfig) -> None:
        self.config = config
        train, held_out = load_examples(config.data, "text")
        self.tokenizer = first_tokenizer(config, train)
        self.init_key, self.key, self.sample_key = assemble.stage_keys(config.seed, "sft", 3)
        self.mesh = make_mesh(config.mesh)
        self.model, self.params = assemble.load_model(
            config.model, self.tokenizer, self.init_key, self.mesh
        )
        check_sizes(config, self.model, self.mesh)
        rows, _ = encode_texts(train, self.tokenizer, config.data)
        self.batches = Batches(
            rows, config.sft.batch_size, config.seed, buckets=config.data.length_buckets
        )
        self.held_out = encode_texts(held_out, self.tokenizer, config.data)[0] if held_out else None
        shown = enumerate(held_out[: config.logging.num_samples], 1)
        self.prompts = [prompt_of(row, number, self.tokenizer) for number, row in shown]
        self.responder = Responder(
            self.model, self.tokenizer, config.generation, config.data.prompt_suffix
        )
        self.total_steps = math.ceil(config.sft.num_epochs * self.batches.steps_per_epoch)
        self.compile_step(sft, config.sft, unembeds=True)
        self.rouge = self._rouge(held_out[: config.sft.rouge_rows])

    def _rouge(self, rows: Sequence[Mapping[str, Any]]) -> TeacherForcedRouge | None:
        """What computes ROUGE on some held-out rows; None without any."""
        if not rows:
            return None
        if not have_completions(rows, self.config.data):
            raise InputError(
                "sft.rouge_rows compares with completions, which the held-out rows do not have: "
                "give rows of prompt and completion, or set it to 0."
            )
        return TeacherForcedRouge(
            self.model,
            self.tokenizer,
            encode_completions(rows, self.tokenizer, self.config.data),
            batch_size=self.config.sft.eval_batch_size,
            place=batch_sharding(self.mesh),
        )

    def evaluate(self, state):
        """Loss in nats per token, accuracy, perplexity and ROUGE on the held-out texts."""
        means = self.held_out_means(state, self.config.sft.eval_batch_size)
        if means:
            means["eval/perplexity"] = perplexity(means["eval/loss"])
        rouge = {} if self.rouge is None else self.rouge(state.params)
        return means | {f"eval/{name}": value for name, value in rouge.items()}

    def samples(self, state, output, count):
        """Responses to held-out prompts, or continuations of the beginnings of held-out texts."""
        if not self.prompts:
            return []
        responses = self.responder(state.params, self.prompts, self.sample_key)
        return [
            {"prompt": prompt, "response": response}
            for prompt, response in zip(self.prompts, responses, strict=True)
        ]

    def finish(self, state):
        """Writes `hf/`, which transformers opens."""
        parts = (self.model, state.params, self.tokenizer)
        assemble.export(self.config.run_dir, save_pretrained, *parts)


def text_of(row: Mapping[str, Any]) -> str:
    """All the text of a row, for training a tokenizer."""
    if "messages" in row:
        return contents(row["messages"])
    names = ("text", "prompt", "completion", "chosen", "rejected")
    parts = [*(row.get(name) for name in names), *row.get("responses", ())]
    return "".join(contents(part) for part in parts)


def prompt_of(row: Mapping[str, Any], number: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """What a sample of the model starts from: the prompt, or the first words of the text."""
    if "messages" in row:
        return row["messages"][0]["content"]
    if "prompt" in row:
        return prompt_text(row, number, tokenizer)
    return " ".join(row["text"].split()[:8])
