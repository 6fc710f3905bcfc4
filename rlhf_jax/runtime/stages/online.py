"""The stage of every online trainer: responses are sampled, scored and trained on.

With one reward model that reads the policy's tokens, an iteration is one compiled program. Any
other reward is computed between two programs, the rollout and the update.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.data.batching import Batches
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.kinds import encode_examples
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.models.huggingface import save_pretrained
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime import program
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.evaluation.best_of import further_keys, with_passes
from rlhf_jax.runtime.evaluation.policies import (
    Comparison,
    EvaluatedResponses,
    PolicyEvaluator,
    columns_of,
    compare,
    evaluation_of,
    first_entries,
    save_evaluation,
    turns_of,
)
from rlhf_jax.runtime.evaluation.python_judge import JUDGED, JudgeFunction, win_rates
from rlhf_jax.runtime.loading import find_token
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.rewards.functions import call_scores, check_call, load_function
from rlhf_jax.runtime.rewards.scorers import (
    check_sources_call,
    load_rewards,
    means_of_parts,
)
from rlhf_jax.runtime.rewards.texts import Responses, decode, reference_tokens
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.checks import check_scorer, find_rewards
from rlhf_jax.runtime.stages.values import load_value_model
from rlhf_jax.training import online
from rlhf_jax.training.flops import mixed_text_flops, online_flops, target_share
from rlhf_jax.training.state import make_optimizer

RewardFunction = Callable[..., list[float]]


def step_settings(config: RunConfig, tokenizer: Any) -> Any:
    """The trainer's settings with `truncate_token` as an id, which the tokenizer must have."""
    token = config.settings.truncate_token
    if token is not None:
        token = find_token(tokenizer, token, f"{config.trainer.name}.truncate_token")
    return dataclasses.replace(config.settings, truncate_token=token)


class OnlineStage(shared.ComparingStage):
    """Training on responses that the policy samples; see `run.stage.Stage`.

    Args:
      config: that of an online trainer.
      reward_fn: a reward in Python, of weight 1.
    """

    _make_step: Callable[..., Any] = staticmethod(online.make_step)

    def __init__(self, config: RunConfig, reward_fn: RewardFunction | None = None) -> None:
        super().__init__(config)
        self.sources = find_rewards(config, reward_fn, config.settings.judge_fn)
        self._load()
        self._compile()

    def _load(self) -> None:
        config, data, settings = self.config, self.config.data, self.config.settings
        evaluation = config.section("evaluation")
        names = (evaluation.gold_fn, evaluation.judge_fn)
        self.gold_fn, self.judge_fn = (
            None if name is None else load_function(name) for name in names
        )
        name = settings.judge_fn
        self.training_judge = None if name is None else load_function(name)
        self.judge_fn = self.judge_fn or self.training_judge
        kind = self.trainer.reads(settings)
        self.examples, self.held_out_examples = self.load_examples(data, kind)
        self.load_policy(list)
        self.settings = step_settings(config, self.tokenizer)
        check_sources_call(self.sources, columns_of(self.examples, [0]))
        if self.gold_fn is not None:
            check_call(self.gold_fn, columns_of(self.examples, [0]))
        for judge in filter(None, {self.judge_fn, self.training_judge}):
            check_call(judge, columns_of(self.examples, [0]), JUDGED)
        self._load_rewards()
        self.value_model, self.value_params = load_value_model(config, self.tokenizer, self.mesh)
        self.batches = self._batches(kind, self.examples, data, settings.batch_size, config.seed)
        self.texts = None
        if self.trainer.mixes_texts and settings.ptx_coef:
            texts, _ = self.load_examples(config.section("ptx"), "text")
            # Another seed than that of the prompts, which may be as many.
            self.texts = self._batches(
                "text", texts, config.section("ptx"), settings.num_texts, config.seed + 1
            )
        self.held_out = None
        if self.held_out_examples:
            self.held_out = encode_examples(kind, self.held_out_examples, self.tokenizer, data)
        self.total_steps = settings.total_iterations

    def _batches(
        self, kind: Kind, examples: Any, data: DataSettings, batch_size: int, seed: int
    ) -> Batches:
        arrays = encode_examples(kind, examples, self.tokenizer, data)
        return Batches(arrays, batch_size, seed, buckets=data.length_buckets)

    def _load_rewards(self) -> None:
        """One reward model of tokens is part of the full step; others score between its halves."""
        config = self.config
        self.rewards, params = load_rewards(
            self.sources, config.model, self.tokenizer, mesh=self.mesh
        )
        for scorer in self.rewards.token_models:
            check_scorer(config, scorer)
        self.references = None
        if config.settings.subtract_reference_score:
            self.references = reference_tokens(self.examples, self.tokenizer, config.data)
        self.reward_model = self.rewards.single if self.references is None else None
        self.reward_params = params[0] if self.reward_model is not None else params or None

    def _compile(self) -> None:
        config, stops = self.config, self.model.stop_token_ids
        trained = [self.model, *filter(None, [self.value_model])]
        updates = config.settings.num_updates
        self.optimizer = make_optimizer(config.optimizer, updates, models=trained)
        models = [*trained, *self.rewards.models]
        rules = sum((model.partition_rules for model in dict.fromkeys(models)), ())
        place = self._place = program.Placement(self.mesh, rules)
        self.batch_sharding = place.batch
        shapes = jax.eval_shape(self._init, self.params, self.reward_params, self.value_params)
        self.flops_per_token = online_flops(
            self.model,
            shapes,
            self.settings,
            prompt_length=float(self.batches.examples.prompt_mask.sum(axis=1).mean()),
            reward_models=self.rewards.models,
            value_model=self.value_model,
        )
        if self.texts is not None:  # an iteration's texts, on average
            tokens = np.mean((self.texts.examples.segments > 0).sum(axis=1)) * self.texts.batch_size
            share = target_share(self.texts.examples)
            flops_per_text_token = mixed_text_flops(
                self.model, shapes, self.settings, target_share=share
            )
            self.flops_per_step = flops_per_text_token * float(tokens)
        update = self.steps.make_update_step(self.model, self.settings, **self._options())
        if self.reward_model is not None:
            parts, score = (self.model, self.settings, update), self.reward_model
            step = self._make_step(*parts, reward_model=score, stop_token_ids=stops)
            self._step = place.step(step, shapes, returns_batch=True)
        else:
            sample = online.make_rollout_step(self.model, self.settings, stop_token_ids=stops)
            self._sample = place.rollout(sample, shapes)
            self._update = place.update(update, shapes)
        self.evaluator = PolicyEvaluator(
            self.model,
            self.tokenizer,
            **self._evaluation_sampler(),
            temperature=config.settings.temperature,
            reward_model=self.reward_model,
            rewards=self.rewards if self.sources else None,
            gold_fn=self.gold_fn,
            batch_size=config.section("evaluation").batch_size,
            batch_sharding=place.batch,
        )

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of the trainer's `make_update_step`."""
        stops = self.model.stop_token_ids
        value = {"value_model": self.value_model} if self.trainer.has_value_model else {}
        return {"optimizer": self.optimizer, "stop_token_ids": stops, **value}

    def _evaluation_sampler(self) -> dict[str, Any]:
        """Arguments of `PolicyEvaluator`: how one response to each prompt is sampled."""
        return {"sample": self._sample_for_evaluation}

    def _sample_for_evaluation(self, params: Any, batch: PromptBatch, key: jax.Array) -> Rollout:
        return online.sample_responses(
            self.model, params, batch, key, self.settings, stop_token_ids=self.model.stop_token_ids
        )

    def _init(self, params: Any, reward_params: Any, value_params: Any) -> Any:
        options = {"value_params": value_params} if self.trainer.has_value_model else {}
        return self.steps.init_state(
            self.model,
            params,
            self.settings,
            self.key,
            optimizer=self.optimizer,
            reward_params=reward_params,
            **options,
        )

    def init_state(self) -> Any:
        """The state before the first iteration, sharded; the loaded parameters are freed."""
        loaded = (self.params, self.reward_params, self.value_params)
        state = self._place.initialise(self._init, *loaded)
        self.params = self.reward_params = self.value_params = None
        return state

    def step(self, state: Any, index: int) -> Any:
        """One iteration on batch number `index`; its output is the rollout and its examples."""
        batch, key = self._batch(index), jax.random.fold_in(self.key, index)
        self.show_memory(state, self._programs(state, batch, key))
        if self.reward_model is not None:
            state, metrics, rollout = self._step(state, batch, key)
            return state, metrics, (rollout, batch.indices)
        sample_key, update_key = jax.random.split(key)
        responses = self._sample(state, batch, sample_key)
        scores, parts = self._score(state, batch, responses)
        scores = hosts.from_host(scores, self.batch_sharding)
        state, metrics, rollout = self._update(state, batch, responses, scores, update_key)
        return state, metrics | self._means(scores, parts), (rollout, batch.indices)

    def _means(self, scores: Any, parts: dict[str, np.ndarray]) -> dict[str, Any]:
        """Metrics of the scores, and of the parts that they are sums of."""
        return dict(means_of_parts(parts))

    def _programs(self, state: Any, batch: PromptBatch, key: jax.Array) -> list[tuple[Any, Any]]:
        """The compiled parts of an iteration, and their arguments or the shapes of these."""
        if self.reward_model is not None:
            return [(self._step, (state, batch, key))]
        responses = jax.eval_shape(self._sample, state, batch, key)
        scores = jax.ShapeDtypeStruct(responses.tokens.shape[:-1], "float32")
        rest = (batch, responses, scores, key)
        return [(self._sample, (state, batch, key)), (self._update, (state, *rest))]

    def _batch(self, index: int) -> PromptBatch:
        batch = shared.batch_at(self.batches, index, self.batch_sharding)
        if self.texts is None:
            return batch
        return batch._replace(texts=shared.batch_at(self.texts, index, self.batch_sharding))

    def _score(
        self, state: Any, batch: PromptBatch, responses: Rollout
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """f32[B] or f32[B, K] scores, and the parts that they are sums of, float[B * K] each."""
        if hosts.several():
            batch, responses = hosts.to_host((batch, responses))
        if self.training_judge is not None:
            return self._judged(self.training_judge, batch, responses), {}
        count = self.settings.num_responses or 1
        indices = np.repeat(batch.indices, count)
        candidates = [shared.flat((responses.tokens, responses.mask), responses.tokens.ndim - 1)]
        if self.references is not None:
            tokens, mask = self.references
            candidates.append((tokens[indices], mask[indices]))
        scored = Responses(
            self.tokenizer,
            np.repeat(batch.prompts, count, axis=0),
            np.repeat(batch.prompt_mask, count, axis=0),
            candidates,
            columns_of(self.examples, indices),
            indices,
            self.model.stop_token_ids,
            turns_of(self.examples, indices),
        )
        size = count * (self.settings.score_batch_size or self.settings.batch_size)
        scores, parts = self.rewards(state.frozen.get("reward", ()), scored, size)
        return scores.reshape(responses.tokens.shape[:-1]), parts

    def _judged(self, judge: JudgeFunction, batch: PromptBatch, responses: Rollout) -> np.ndarray:
        """f32[B, K]: the win rates of the responses by the judge."""
        prompts = decode(self.tokenizer, batch.prompts, batch.prompt_mask)
        columns = columns_of(self.examples, batch.indices)
        texts = [
            decode(self.tokenizer, responses.tokens[:, k], responses.mask[:, k])
            for k in range(responses.tokens.shape[1])
        ]
        return win_rates(judge, prompts, texts, columns)

    def observe(self, output: Any) -> dict[str, float]:
        """The gold score of the sampled responses, where there is one."""
        if self.gold_fn is None:
            return {}
        rollout, indices = shared.one_each(*hosts.to_host(output))
        prompts = decode(self.tokenizer, rollout.prompts, rollout.prompt_mask)
        completions = decode(self.tokenizer, rollout.tokens, rollout.mask)
        columns = columns_of(self.examples, indices)
        gold = call_scores(self.gold_fn, prompts, completions, columns)
        return {"objective/gold": float(np.mean(gold))}

    def _comparison(self, state: Any) -> Comparison:
        """Scores, KL, gold scores and win rates of the policy, against the reference."""
        assert self.held_out is not None
        columns = columns_of(self.held_out_examples, self.held_out.indices)
        after = self._respond(state, online.policy_params(self.model, state))
        return compare(self._reference(state), after, self.judge_fn, columns)

    def _reference(self, state: Any) -> EvaluatedResponses:
        """The responses of the reference, sampled once a run."""
        if self._before is None:
            self._before = self._respond(state)
        return self._before

    def _reference_params(self, state: Any) -> Any:
        """The full parameters of the reference."""
        return online.reference_params(self.model, state)

    def _respond(self, state: Any, params: Any = None) -> EvaluatedResponses:
        """Responses to the held-out prompts, by default of the reference."""
        ref, reward = self._reference_params(state), state.frozen.get("reward")
        assert self.held_out is not None
        rest = (self.held_out_examples, ref, reward, self.eval_key)
        return self.evaluator(ref if params is None else params, self.held_out, *rest)

    def _groups(self, state: Any) -> dict[str, list[EvaluatedResponses]]:
        """Several responses of the reference and of the policy to each held-out prompt."""
        assert self.held_out is not None
        ref = self._reference_params(state)
        # The KL is that of the first response alone.
        rest = (self.held_out, self.held_out_examples, None, state.frozen.get("reward"))
        keys = further_keys(self.eval_key, self.config.section("evaluation").num_responses)
        first, policy = self._compare(state), online.policy_params(self.model, state)
        return {
            "before": [first.before, *(self.evaluator(ref, *rest, key) for key in keys)],
            "after": [first.after, *(self.evaluator(policy, *rest, key) for key in keys)],
        }

    def samples(self, state: Any, output: Any, count: int) -> list[dict[str, Any]]:
        """Responses of the last iteration, with score, and KL in nats; [] after a restart.

        Before the first iteration they are those of the reference to held-out prompts.
        """
        if output is None:
            if int(state.step) > 0 or self.held_out is None:
                return []
            before = self._reference(state)
            columns = {"prompt": before.prompts, "response": before.responses}
            return first_entries({**columns, "score": before.scores, "kl": before.kl}, count)
        group = self.settings.num_responses or 1
        return shared.rollout_samples(self.tokenizer, hosts.to_host(output), count, group)

    def frozen_paths(self) -> list[str | None]:
        """The folders of the policy and of the reward models."""
        rewards = [each.source.path for each in self.sources if each.source.path is not None]
        return [self.config.model.path, *rewards]

    def finish(self, state: Any) -> epath.Path:
        """Writes `hf/`, `evaluation.json` where there are held-out prompts, and the report."""
        policy = online.policy_params(self.model, state)
        shared.export_model(self.config, save_pretrained, self.model, policy, self.tokenizer)
        if self.held_out is not None:
            settings = self.config.section("evaluation")
            evaluation = evaluation_of(self._compare(state), settings.num_samples)
            if settings.num_responses > 1:
                evaluation = with_passes(evaluation, self._groups(state), settings.pass_threshold)
            save_evaluation(self.config.run_dir, evaluation)
        return hosts.from_first(write_report, epath.Path(self.config.run_dir))
