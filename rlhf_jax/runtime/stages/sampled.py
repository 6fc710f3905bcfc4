"""The stage of trainers that sample first: responses are sampled, scored, selected, trained on."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.kinds import encode_examples
from rlhf_jax.models.interface import Params
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.evaluation.policies import (
    Comparison,
    EvaluatedResponses,
    compare,
    evaluation_of,
    save_evaluation,
)
from rlhf_jax.runtime.loading import compute_dtype
from rlhf_jax.runtime.rewards.scorers import load_rewards
from rlhf_jax.runtime.run.folder import disk_errors, encode_line, replace_file
from rlhf_jax.runtime.run.progress import show_note
from rlhf_jax.runtime.run.records import digest
from rlhf_jax.runtime.sampling.samples import (
    SampledSet,
    ScoredSampler,
    check_functions,
    check_sampled_positions,
    mark_of,
)
from rlhf_jax.runtime.sampling.selection import Entry, select
from rlhf_jax.runtime.stages.checks import find_rewards
from rlhf_jax.runtime.stages.offline import PolicyStage
from rlhf_jax.runtime.stages.shared import ComparingStage

SAMPLED, SELECTED = "sampled.jsonl", "selected.jsonl"


class SampledStage(ComparingStage, PolicyStage):
    """Training on the best of the model's own responses; see `run.stage.Stage`.

    All responses are in `sampled.jsonl` of the run, and those that are trained on in
    `selected.jsonl`. Evaluations sample a response to each held-out prompt and score it.

    Args:
      config: that of a trainer with `samples_first`.
      reward_fn: a reward in Python, of weight 1.
    """

    def __init__(
        self, config: RunConfig, reward_fn: Callable[..., list[float]] | None = None
    ) -> None:
        self.sources = find_rewards(config, reward_fn)
        super().__init__(config)

    def _load(self) -> tuple[list[Any], list[Any]]:
        """Tokenizer, models, the selected responses, and the held-out prompts."""
        config, generation = self.config, self.config.section("generation")
        examples, held_out = self.load_examples(config.data, "prompts")
        check_functions(self.sources, examples)
        self.load_policy(list)
        rewards, self._reward_params = load_rewards(
            self.sources, config.model, self.tokenizer, mesh=self.mesh
        )
        for scorer in rewards.token_models:
            check_sampled_positions(scorer, config.data.max_prompt_length, generation, scored=True)
        self._sampler = ScoredSampler(self.model, self.tokenizer, generation, rewards, self.mesh)
        with jax.set_mesh(self.mesh):
            selected = self._select(self._sample(examples))
        self.fingerprints["The selected responses"] = {
            "their number": len(selected),
            "their SHA-256": digest(selected),
        }
        return selected, held_out

    def _sample(self, examples: list[Any]) -> list[list[Entry]]:
        """The responses to each prompt, as they are in `sampled.jsonl`."""
        config = self.config
        prompts = encode_examples("prompts", examples, self.tokenizer, config.data)
        file, settings = epath.Path(config.run_dir) / SAMPLED, config.settings
        sampled = SampledSet(file, settings.num_samples, config.seed)
        data = (self.params, self._reward_params)
        dtype = compute_dtype(config.model.dtype)
        mark = mark_of(examples, prompts, self._sampler, *data, self.sources, sampled, dtype)
        shown = config.logging.progress and hosts.is_first()
        return sampled.completed(self._sampler, *data, examples, prompts, mark, shown)

    def _select(self, groups: list[list[Entry]]) -> list[Entry]:
        """The responses that are trained on, which `selected.jsonl` holds."""
        config, settings = self.config, self.config.settings
        selected = select(
            groups,
            threshold=settings.threshold,
            max_per_prompt=settings.max_per_prompt,
            keep_truncated=settings.keep_truncated,
        )
        content = b"".join(map(encode_line, selected))
        with disk_errors(config.run_dir):
            hosts.from_first(replace_file, f"{config.run_dir}/{SELECTED}", content)
        if config.logging.progress and hosts.is_first():
            scores = [entry["score"] for group in groups for entry in group]
            mean = np.mean([entry["score"] for entry in selected])
            show_note(
                f"{self.name}: {len(selected)} of {len(scores)} responses are selected; their mean "
                f"score is {mean:.4g}, that of all {np.mean(scores):.4g}"
            )
        return selected

    def init_state(self) -> Any:
        """The state before the first step, sharded; the loaded parameters are freed."""
        if self.held_out is not None:
            self._before = self._respond(self.params)
        return super().init_state()

    def _respond(self, params: Params) -> EvaluatedResponses:
        """Scored responses to the held-out prompts, one each."""
        assert self.held_out is not None
        # As many responses at a time as of the data set, which the same programs score.
        size = self._sampler.generation.batch_size * self.config.settings.num_samples
        parts = [
            self._sampler(
                params,
                self._reward_params,
                batch,
                self.held_out_examples,
                jax.random.fold_in(self.eval_key, index),
            )
            for index, batch in enumerate(eval_batches(self.held_out, size))
        ]
        masks = [responses.candidates[0][1] for responses, _ in parts]
        return EvaluatedResponses(
            [text for responses, _ in parts for text in responses.prompt_texts],
            [text for responses, _ in parts for text in responses.texts[0]],
            None,
            np.concatenate([mask.sum(axis=1) for mask in masks]),
            np.concatenate([scores for _, scores in parts]),
            None,
        )

    def _comparison(self, state: Any) -> Comparison:
        """Scores and the win rate of the policy, against the initial one."""
        assert self._before is not None
        return compare(self._before, self._respond(self.full_params(state)))

    def finish(self, state: Any) -> epath.Path:
        """Writes `evaluation.json` with the held-out responses, `hf/` and the report."""
        if self.held_out is not None:
            count = self.config.logging.num_samples
            evaluation = evaluation_of(self._compare(state), count)
            save_evaluation(self.config.run_dir, evaluation)
        return super().finish(state)
