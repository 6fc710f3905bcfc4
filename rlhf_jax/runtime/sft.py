"""The stage of supervised fine-tuning: `train_sft`."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from rlhf_jax.data.batching import Batches, eval_batches
from rlhf_jax.data.datasets import load_rows
from rlhf_jax.data.sft import text_rows
from rlhf_jax.models.huggingface import save_pretrained
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import (
    batch_sharding,
    check_batch_size,
    replicated,
    tree_shardings,
)
from rlhf_jax.runtime import assemble, loop
from rlhf_jax.runtime.config import SFTConfig, resolve
from rlhf_jax.runtime.evaluation import perplexity, sum_metrics
from rlhf_jax.runtime.generation import Responder
from rlhf_jax.training import sft
from rlhf_jax.training.state import make_optimizer


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
    return loop.run(lambda: SFTStage(config), config)


class SFTStage:
    """What the loop needs of supervised fine-tuning; see `loop.Stage`."""

    name = "sft"

    def __init__(self, config: SFTConfig) -> None:
        self.config = config
        train, held_out = load_rows(config.data, "text")
        self.tokenizer = assemble.choose_tokenizer(
            config.tokenizer, config.model.path, lambda: (text_of(row) for row in train)
        )
        init_key, self.key, self.sample_key = jax.random.split(jax.random.key(config.seed), 3)
        self.model, self.params = assemble.load_model(config.model, self.tokenizer, init_key)
        assemble.check_positions(self.model, config.data.max_length, "data.max_length")
        rows, _ = text_rows(train, self.tokenizer, config.data)
        self.batches = Batches(rows, config.sft.batch_size, config.seed)
        self.held_out = text_rows(held_out, self.tokenizer, config.data)[0] if held_out else None
        self.prompts = [prompt_of(row) for row in held_out[: config.logging.num_samples]]
        self.responder = Responder(self.model, self.tokenizer, config.generation)
        self.total_steps = math.ceil(config.sft.num_epochs * self.batches.steps_per_epoch)
        self._compile()

    def _compile(self) -> None:
        config = self.config
        self.mesh = make_mesh(config.mesh)
        check_batch_size(self.mesh, "sft.batch_size", config.sft.batch_size)
        check_batch_size(self.mesh, "sft.eval_batch_size", config.sft.eval_batch_size)
        self.optimizer = make_optimizer(config.optimizer, self.total_steps)
        shape = jax.eval_shape(self._init, self.params)
        state, rows, whole = (
            tree_shardings(self.mesh, shape),
            batch_sharding(self.mesh),
            replicated(self.mesh),
        )
        self._step = jax.jit(
            sft.make_step(self.model, config.sft, optimizer=self.optimizer),
            in_shardings=(state, rows, whole),
            out_shardings=(state, whole),
            donate_argnums=0,
        )
        self._evaluate = jax.jit(
            sft.make_eval_step(self.model),
            in_shardings=(state.params, rows),
            out_shardings=whole,
        )

    def _init(self, params):
        return sft.init_state(
            self.model, params, self.config.sft, self.key, optimizer=self.optimizer
        )

    def init_state(self):
        """The state before the first step, sharded; the loaded parameters are let go."""
        state = assemble.born_sharded(self.mesh, self._init, self.params)
        self.params = None
        return state

    def step(self, state, index):
        """One optimizer step on batch number `index`."""
        state, metrics = self._step(
            state, self.batches.at(index), jax.random.fold_in(self.key, index)
        )
        return state, metrics, None

    def observe(self, output):
        """Nothing: all metrics come from the device."""
        return {}

    def evaluate(self, state):
        """Loss in nats per token, accuracy and perplexity on the held-out texts."""
        if self.held_out is None:
            return {}
        batches = eval_batches(self.held_out, self.config.sft.eval_batch_size)
        sums = sum_metrics(self._evaluate(state.params, batch) for batch in batches)
        loss = sums["loss"] / sums["count"]
        return {
            "eval/loss": loss,
            "eval/accuracy": sums["accuracy"] / sums["count"],
            "eval/perplexity": perplexity(loss),
        }

    def samples(self, state, output, count):
        """Responses to held-out prompts, or continuations of the beginnings of held-out texts."""
        if not self.prompts:
            return []
        responses = self.responder(state.params, self.prompts, self.sample_key)
        return [
            {"prompt": prompt, "response": response}
            for prompt, response in zip(self.prompts, responses, strict=True)
        ]

    def saved(self, state):
        """All of it."""
        return state

    def resumed(self, state, saved):
        """All of it."""
        return saved

    def finish(self, state):
        """Writes `hf/`, which transformers opens."""
        folder = f"{self.config.run_dir}/hf"
        save_pretrained(folder, self.model, jax.device_get(state.params), self.tokenizer)


def text_of(row: Mapping[str, Any]) -> str:
    """All the text of a row, for training a tokenizer."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    names = ("text", "prompt", "completion", "chosen", "rejected")
    return "".join(str(row.get(name) or "") for name in names)


def prompt_of(row: Mapping[str, Any]) -> str:
    """What a sample of the model starts from: the prompt, or the first words of the text."""
    if "messages" in row:
        return row["messages"][0]["content"]
    return row["prompt"] if "prompt" in row else " ".join(row["text"].split()[:8])
