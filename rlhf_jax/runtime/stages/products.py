"""The products of offline training: a policy that answers prompts, a reward model that scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.chat import prompt_text
from rlhf_jax.data.encoding import warn
from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import save_pretrained, save_reward_model
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import batch_sharding
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.evaluation.normalization import Normalizer
from rlhf_jax.runtime.evaluation.pairs import pair_evaluation, score_pairs
from rlhf_jax.runtime.evaluation.policies import save_evaluation
from rlhf_jax.runtime.evaluation.responses import Responder
from rlhf_jax.runtime.evaluation.teacher_forced import (
    TeacherForcedRouge,
    encode_completions,
    have_completions,
    perplexity,
)
from rlhf_jax.runtime.rewards.texts import decode
from rlhf_jax.runtime.stages import shared

Examples = Sequence[Mapping[str, Any]]


@dataclasses.dataclass
class Product:
    """What a kind of trained model is evaluated, sampled and exported by.

    Attributes:
      train, held_out: the examples as they were read.
      train_batch, held_out_batch: all of them as arrays; the second is None without any.
    """

    config: RunConfig
    model: Model
    tokenizer: Any
    mesh: Mesh
    train: Examples
    held_out: Examples
    train_batch: Any
    held_out_batch: Any

    def __post_init__(self) -> None:
        """Prepares evaluation and samples."""

    def prepare(self, state: Any) -> Any:
        """The state before the first step."""
        return state

    def exported(self, state: Any) -> Any:
        """The state whose model is exported."""
        return state


class PolicyProduct(Product):
    """A language model: it answers held-out prompts, and is exported as it is."""

    def __post_init__(self) -> None:
        config, held_out = self.config, self.held_out
        shown = held_out[: config.logging.num_samples]
        self.prompts = [prompt_of(each, n, self.tokenizer) for n, each in enumerate(shown, 1)]
        generation, suffix = config.section("generation"), config.data.prompt_suffix
        self.responder = Responder(self.model, self.tokenizer, generation, suffix)
        margins = sum(each.get("margin", 0.0) != 0 for each in self.train)
        name = config.trainer.name
        warn(margins, len(self.train), f"examples have a margin, which {name} ignores.")
        self.rouge = None
        if config.trainer.has_rouge and (judged := held_out[: config.settings.rouge_rows]):
            self.rouge = self._rouge(judged)

    def _rouge(self, held_out: Examples) -> TeacherForcedRouge:
        """Teacher-forced ROUGE on some held-out examples."""
        if not have_completions(held_out, self.config.data):
            raise InputError(
                f"{self.config.trainer.name}.rouge_rows compares with completions, which the "
                "held-out examples do not have: give prompts and completions, or set it to 0."
            )
        return TeacherForcedRouge(
            self.model,
            self.tokenizer,
            encode_completions(held_out, self.tokenizer, self.config.data),
            batch_size=self.config.settings.eval_batch_size,
            batch_sharding=batch_sharding(self.mesh),
        )

    def metrics(self, params: Params, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity of texts, and ROUGE where it is computed."""
        metrics = {} if self.rouge is None else self.rouge(params)
        if self.config.trainer.reads(self.config.settings) == "text":
            metrics = {"perplexity": perplexity(means["eval/loss"]), **metrics}
        return {f"eval/{name}": value for name, value in metrics.items()}

    def samples(self, params: Params, key: jax.Array, count: int) -> list[dict[str, Any]]:
        """Responses to held-out prompts, or continuations of the beginnings of held-out texts."""
        if not self.prompts:
            return []
        responses = self.responder(params, self.prompts, key)
        return [
            {"prompt": prompt, "response": response}
            for prompt, response in zip(self.prompts, responses, strict=True)
        ]

    def finish(self, params: Params) -> None:
        """Writes `hf/`."""
        shared.export_model(self.config, save_pretrained, self.model, params, self.tokenizer)


class RewardModelProduct(Product):
    """A reward model: it scores held-out pairs, and is normalized before or after training.

    Checkpoints, metrics and samples are of the model as it is trained, so that those of all steps
    have one scale; the export and `evaluation.json` are of the normalized one.
    """

    def __post_init__(self) -> None:
        settings, seed = self.config.settings, self.config.seed
        self.normalize = Normalizer(self.model, self.mesh, self.train_batch, settings, seed)
        self._score = jax.jit(end_scores, static_argnums=0)
        if settings.objective != "last_token":
            unused = f"examples have a margin, which reward.objective {settings.objective} ignores."
            with_margin = sum(each["margin"] != 0 for each in self.train)
            warn(with_margin, len(self.train), unused)

    def prepare(self, state: Any) -> Any:
        """The state, normalized where `normalize_before` says so."""
        return self._normalized(state) if self.config.settings.normalize_before else state

    def exported(self, state: Any) -> Any:
        """The state, normalized where `normalize_after` says so."""
        return self._normalized(state) if self.config.settings.normalize_after else state

    def _normalized(self, state: Any) -> Any:
        return state._replace(params=self.normalize(state.params, state.frozen))

    def metrics(self, params: Params, means: Mapping[str, float]) -> dict[str, float]:
        """{}: all metrics are those of the evaluation step."""
        return {}

    def samples(self, params: Params, key: jax.Array, count: int) -> list[dict[str, Any]]:
        """Held-out pairs or rankings with the scores of all their responses."""
        if self.held_out_batch is None or count == 0:
            return []
        batch = jax.tree.map(lambda array: np.asarray(array[:count]), self.held_out_batch)
        sequences = jax.tree.map(np.asarray, self.config.trainer.steps.sequences_of(batch))
        responses, masks = sequences.tokens, sequences.mask
        scores = hosts.to_host(self._score(self.model, params, sequences))
        prompts = decode(self.tokenizer, batch.prompts, batch.prompt_mask)
        places = range(responses.shape[1])
        texts = [decode(self.tokenizer, responses[:, k], masks[:, k]) for k in places]
        labels = ["chosen", "rejected"]
        if self.config.settings.objective == "ranking":
            labels = [f"place {k + 1}" for k in places]
        return [
            {
                "prompt": prompt,
                "response": texts[k][number],
                "label": labels[k],
                "score": float(scores[number, k]),
            }
            for number, prompt in enumerate(prompts)
            for k in places
            if masks[number, k].any()
        ]

    def finish(self, params: Params) -> None:
        """Writes `evaluation.json` of the held-out pairs, and `hf/`."""
        if self.held_out_batch is not None:
            step = jax.jit(self.config.trainer.steps.make_score_step(self.model))
            sharding = batch_sharding(self.mesh)
            pairs = score_pairs(
                lambda batch: hosts.to_host(step(params, hosts.put(batch, sharding))),
                eval_batches(self.held_out_batch, self.config.settings.eval_batch_size),
            )
            save_evaluation(self.config.run_dir, pair_evaluation(pairs))
        shared.export_model(self.config, save_reward_model, self.model, params, self.tokenizer)


def prompt_of(example: Mapping[str, Any], number: int, tokenizer: Any) -> str:
    """The start of a sample: the prompt, also of the last turn, or the first words of a text."""
    if "prompt" in example or "messages" in example:
        return prompt_text(example, number, tokenizer)
    return " ".join(example["text"].split()[:8])
