"""The stages of offline trainers: examples through one compiled step, of either kind of model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rlhf_jax.data.batching import Batches, eval_batches
from rlhf_jax.data.chat import prompt_text
from rlhf_jax.data.encoding import warn
from rlhf_jax.data.kinds import encode_examples
from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import save_pretrained, save_reward_model
from rlhf_jax.models.interface import Params
from rlhf_jax.parallel import hosts
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.runtime import program
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
    sum_metrics,
)
from rlhf_jax.runtime.loading import load_reference
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.rewards.texts import decode
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.checks import check_judged, check_lengths
from rlhf_jax.runtime.stages.reference import with_reference
from rlhf_jax.training.flops import offline_flops, target_share
from rlhf_jax.training.state import make_optimizer

Examples = Sequence[Mapping[str, Any]]


class OfflineStage(shared.BaseStage):
    """Training on examples that are there before it begins; see `run.stage.Stage`.

    Attributes:
      train_examples, held_out_examples: as they were read.
      held_out: the latter as arrays; None without any.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        settings, data = config.settings, config.data
        kind = self.trainer.reads(settings)
        self.train_examples, self.held_out_examples = train, held_out = self._load()
        train_batch = encode_examples(kind, train, self.tokenizer, data)
        self.batches = Batches(
            train_batch, settings.batch_size, config.seed, buckets=data.length_buckets
        )
        self.held_out = None
        if held_out:
            held_out_kind = self.trainer.kind_in_data(settings)
            self.held_out = encode_examples(held_out_kind, held_out, self.tokenizer, data)
        if self.trainer.trains == "policy":
            check_judged(kind, train_batch, self.held_out)
        self.total_steps = math.ceil(settings.num_epochs * self.batches.steps_per_epoch)
        self._compile()

    def _load(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Tokenizer, model, and the training and held-out examples."""
        kind = self.trainer.reads(self.config.settings)
        train, held_out = self.load_examples(self.config.data, kind)
        self.load_policy(lambda: map(shared.text_of, train))
        return train, held_out

    def _compile(self) -> None:
        steps, settings = self.steps, self.config.settings
        optimizer = make_optimizer(self.config.optimizer, self.total_steps, models=[self.model])

        def init(params):
            return steps.init_state(self.model, params, settings, self.key, optimizer=optimizer)

        place = program.Placement(self.mesh, self.model.partition_rules)
        self.batch_sharding = place.batch
        self._init, self._place = init, place
        step = steps.make_step(self.model, settings, optimizer=optimizer)
        shapes = jax.eval_shape(init, self.params)
        self._step = place.step(step, shapes)
        full = jax.eval_shape(self.full_params, shapes)
        self._evaluate = place.evaluation(steps.make_eval_step(self.model, settings), full)
        trains_policy = self.trainer.trains == "policy"
        share = target_share(self.batches.examples) if trains_policy else 0.0
        self.flops_per_token = offline_flops(self.model, shapes, target_share=share)

    def full_params(self, state: Any) -> Any:
        """The parameters of the full model, or reward model."""
        return self.steps.full_params(self.model, state)

    def init_state(self) -> Any:
        """The state before the first step, sharded; the loaded parameters are freed."""
        if self.trainer.has_reference and self.config.settings.has_reference:
            self._compute_reference()
        state = self._place.initialise(self._init, self.params)
        self.params = None
        return state

    def _compute_reference(self) -> None:
        """Adds the log-probabilities of the reference to the examples that need them."""
        batches = {"eval": self.held_out} if self.held_out is not None else {}
        if self.config.settings.precompute_ref:
            batches["train"] = self.batches.examples
        model, params, place = self.model, self.params, self._place
        if (other := load_reference(self.config.model, self.tokenizer, self.mesh)) is not None:
            model, params = other
            check_lengths(self.trainer.reads(self.config.settings), self.config.data, model)
            place = program.Placement(self.mesh, model.partition_rules)
        step = self.steps.make_reference_step(model, self.config.settings)
        batches = with_reference(batches, params, self.config, place, step)
        self.held_out = batches.get("eval")
        if "train" in batches:
            self.batches = dataclasses.replace(self.batches, examples=batches["train"])

    def step(self, state: Any, index: int) -> Any:
        """One optimizer step on batch number `index`."""
        key = jax.random.fold_in(self.key, index)
        batch = shared.batch_at(self.batches, index, self.batch_sharding)
        self.show_memory(state, [(self._step, (state, batch, key))])
        return *self._step(state, batch, key), None

    def observe(self, output: Any) -> dict[str, float]:
        """{}: all metrics are computed on the devices."""
        return {}

    def evaluate(self, state: Any) -> dict[str, float]:
        """Metrics on the held-out examples, means over all their tokens or pairs; {} without."""
        if self.held_out is None:
            return {}
        params = self.full_params(state)
        batches = eval_batches(self.held_out, self.config.settings.eval_batch_size)
        sums = sum_metrics(self._evaluate(params, self._place.put(batch)) for batch in batches)
        count = sums.pop("count")
        means = {f"eval/{name}": value / count for name, value in sums.items()}
        return means | self._own_metrics(params, means)

    def _own_metrics(self, params: Params, means: Mapping[str, float]) -> dict[str, float]:
        """Further metrics of an evaluation."""
        return {}


class PolicyStage(OfflineStage):
    """Training of a language model, which answers held-out prompts and is exported as it is."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        held_out, train = self.held_out_examples, self.train_examples
        shown = held_out[: config.logging.num_samples]
        self.prompts = [prompt_of(each, n, self.tokenizer) for n, each in enumerate(shown, 1)]
        generation, suffix = config.section("generation"), config.data.prompt_suffix
        self.responder = Responder(self.model, self.tokenizer, generation, suffix)
        margins = sum(each.get("margin", 0.0) != 0 for each in train)
        warn(margins, len(train), f"examples have a margin, which {self.name} ignores.")
        self.rouge = None
        if self.trainer.has_rouge and (judged := held_out[: config.settings.rouge_rows]):
            self.rouge = self._rouge(judged)

    def _rouge(self, held_out: Examples) -> TeacherForcedRouge:
        """Teacher-forced ROUGE on some held-out examples."""
        if not have_completions(held_out, self.config.data):
            raise InputError(
                f"{self.name}.rouge_rows compares with completions, which the "
                "held-out examples do not have: give prompts and completions, or set it to 0."
            )
        return TeacherForcedRouge(
            self.model,
            self.tokenizer,
            encode_completions(held_out, self.tokenizer, self.config.data),
            batch_size=self.config.settings.eval_batch_size,
            batch_sharding=self.batch_sharding,
        )

    def _own_metrics(self, params: Params, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity of texts, and ROUGE where it is computed."""
        metrics = {} if self.rouge is None else self.rouge(params)
        if self.trainer.reads(self.config.settings) == "text":
            metrics = {"perplexity": perplexity(means["eval/loss"]), **metrics}
        return {f"eval/{name}": value for name, value in metrics.items()}

    def samples(self, state: Any, output: Any, count: int) -> list[dict[str, Any]]:
        """Responses to held-out prompts, or continuations of the beginnings of held-out texts."""
        if not self.prompts:
            return []
        responses = self.responder(self.full_params(state), self.prompts, self.eval_key)
        return [
            {"prompt": prompt, "response": response}
            for prompt, response in zip(self.prompts, responses, strict=True)
        ]

    def finish(self, state: Any) -> epath.Path:
        """Writes `hf/` and the report."""
        params = self.full_params(state)
        shared.export_model(self.config, save_pretrained, self.model, params, self.tokenizer)
        return hosts.from_first(write_report, epath.Path(self.config.run_dir))


class RewardModelStage(OfflineStage):
    """Training of a reward model, which scores held-out pairs and may be normalized.

    Checkpoints, metrics and samples are of the model as it is trained, so that those of all steps
    have one scale; the export and `evaluation.json` are of the normalized one.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        settings, train = config.settings, self.train_examples
        batch = self.batches.examples
        self.normalize = Normalizer(self.model, self.mesh, batch, settings, config.seed)
        self._score = jax.jit(end_scores, static_argnums=0)
        if settings.objective != "last_token":
            setting = f"{self.name}.objective {settings.objective}"
            margins = sum(each["margin"] != 0 for each in train)
            warn(margins, len(train), f"examples have a margin, which {setting} ignores.")

    def init_state(self) -> Any:
        """The state before the first step, normalized where `normalize_before` says so."""
        state = super().init_state()
        return self._normalized(state) if self.config.settings.normalize_before else state

    def _normalized(self, state: Any) -> Any:
        return state._replace(params=self.normalize(state.params, state.frozen))

    def samples(self, state: Any, output: Any, count: int) -> list[dict[str, Any]]:
        """Held-out pairs or rankings with the scores of all their responses."""
        if self.held_out is None or count == 0:
            return []
        batch = jax.tree.map(lambda array: np.asarray(array[:count]), self.held_out)
        sequences = jax.tree.map(np.asarray, self.steps.sequences_of(batch))
        responses, masks = sequences.tokens, sequences.mask
        scores = hosts.to_host(self._score(self.model, self.full_params(state), sequences))
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

    def finish(self, state: Any) -> epath.Path:
        """Writes `evaluation.json` of the held-out pairs, `hf/` and the report."""
        config = self.config
        state = self._normalized(state) if config.settings.normalize_after else state
        params = self.full_params(state)
        if self.held_out is not None:
            step = jax.jit(self.steps.make_score_step(self.model))
            pairs = score_pairs(
                lambda batch: hosts.to_host(step(params, hosts.put(batch, self.batch_sharding))),
                eval_batches(self.held_out, config.settings.eval_batch_size),
            )
            save_evaluation(config.run_dir, pair_evaluation(pairs))
        shared.export_model(config, save_reward_model, self.model, params, self.tokenizer)
        return hosts.from_first(write_report, epath.Path(config.run_dir))


def prompt_of(example: Mapping[str, Any], number: int, tokenizer: Any) -> str:
    """The start of a sample: the prompt, also of the last turn, or the first words of a text."""
    if "prompt" in example or "messages" in example:
        return prompt_text(example, number, tokenizer)
    return " ".join(example["text"].split()[:8])
