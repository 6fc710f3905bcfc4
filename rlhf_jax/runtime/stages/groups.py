"""The stage of trainers that compare the responses to a prompt: rewards apart, no reference."""

import functools
import logging
from typing import Any

import jax
import numpy as np

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.evaluation.policies import columns_of
from rlhf_jax.runtime.loading import check_positions, load_model
from rlhf_jax.runtime.rewards.functions import check_call, load_function
from rlhf_jax.runtime.rewards.scorers import means_of_parts
from rlhf_jax.runtime.run.records import fingerprint
from rlhf_jax.runtime.sampling.turns import TRANSCRIPTS, TurnSampler
from rlhf_jax.runtime.stages.online import OnlineStage, RewardFunction
from rlhf_jax.training import dynamic_sampling, online
from rlhf_jax.training.dynamic_sampling import (
    Drawn,
    Groups,
    is_unfinished,
    nothing_drawn,
    update_drawn,
    with_groups,
)

logger = logging.getLogger(__name__)

# Logged iterations in a row without a group of unequal scores, after which a warning is logged.
PATIENCE = 10
_PART = "objective/rewards/"


class GroupStage(OnlineStage):
    """Training on groups of responses; see `OnlineStage` and `run.stage.Stage`."""

    _make_step = staticmethod(dynamic_sampling.make_step)

    def __init__(self, config: RunConfig, reward_fn: RewardFunction | None = None) -> None:
        if config.settings.max_sampling_rounds > 1 and config.data.length_buckets > 1:
            raise InputError(
                f"{config.trainer.name}.max_sampling_rounds needs batches of prompts of one width: "
                f"set data.length_buckets to 1, but it is {config.data.length_buckets}."
            )
        super().__init__(config, reward_fn)
        self._iterations_without_spread = 0

    def load_policy(self, texts: Any) -> None:
        """As `BaseStage.load_policy`; without a reference the initial policy has a checksum."""
        super().load_policy(texts)
        if not self.config.settings.has_reference:
            self.fingerprints[f"The model in {self.config.model.path}"] = {
                "its checksum": int(fingerprint(self.params))
            }

    def _load_rewards(self) -> None:
        """As `OnlineStage._load_rewards`; the environment stands between two programs."""
        super()._load_rewards()
        self.environment = None
        settings = self.config.settings
        if settings.environment_fn is None:
            return
        longest = self.config.data.max_prompt_length + settings.response_length - 1
        key = f"data.max_prompt_length + {self.name}.response_length - 1 + {self.name}.turn_length"
        check_positions(self.model, longest + settings.longest_turn, key)
        self.environment = load_function(settings.environment_fn)
        check_call(self.environment, columns_of(self.examples, [0]), TRANSCRIPTS)
        if self.reward_model is not None:
            self.reward_model, self.reward_params = None, (self.reward_params,)

    def _compile(self) -> None:
        super()._compile()
        add = functools.partial(with_groups, self.settings, self.model.stop_token_ids)
        place = self._place
        rest = [place.replicated] * (len(Drawn._fields) - 1)
        shardings = Drawn._make([place.batch, *rest])
        self._with_groups = jax.jit(add, out_shardings=shardings)
        if self.environment is not None:
            shapes = jax.eval_shape(self._init, self.params, self.reward_params, self.value_params)
            self._sample = self._turns(
                self.examples,
                functools.partial(online.policy_params, self.model),
                functools.partial(place.rollout, state=shapes),
                num_responses=self.settings.num_responses,
            )

    def _turns(
        self, examples: list[dict[str, Any]], params_of: Any, compiled: Any, **options: Any
    ) -> TurnSampler:
        environment: Any = self.environment
        parts = (self.model, self.tokenizer, self.settings, environment, examples)
        options |= {"params_of": params_of, "compiled": compiled}
        return TurnSampler(*parts, sharding=self.batch_sharding, **options)

    def _evaluation_sampler(self) -> dict[str, Any]:
        if self.environment is None:
            return super()._evaluation_sampler()
        sample = self._turns(self.held_out_examples, lambda params: params, jax.jit)
        return {"sample": sample, "samples_on_host": True}

    def _programs(self, state: Any, batch: PromptBatch, key: jax.Array) -> list[tuple[Any, Any]]:
        """As `OnlineStage._programs`, with the longest turn of several."""
        if self.environment is None:
            return super()._programs(state, batch, key)
        programs, responses = self._sample.programs(state, batch, key)
        scores = jax.ShapeDtypeStruct(responses.tokens.shape[:-1], "float32")
        return [*programs, (self._update, (state, batch, responses, scores, key))]

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "reward_weights": tuple(self.rewards.weights)}

    def step(self, state: Any, index: int) -> Any:
        """As `OnlineStage.step`; with one program the reward model has its metrics by name."""
        is_drawn = self.settings.max_sampling_rounds > 1
        step = self._drawing_step if is_drawn else super().step
        state, metrics, output = step(state, index)
        if self.reward_model is not None:
            (name,) = self.rewards.names
            scored = "dynamic_sampling/reward" if is_drawn else "reward"
            metrics[f"rewards/{name}/mean"] = metrics[scored]
            if not is_drawn:
                metrics[f"rewards/{name}/std"] = metrics["reward_std"]
        return state, metrics, output

    def _drawing_step(self, state: Any, index: int) -> Any:
        """One iteration that draws batches of prompts from where the state stands in the data."""
        key, first = jax.random.fold_in(self.key, index), int(state.prompt_batches)
        if self.reward_model is not None:
            rounds = range(self.settings.max_sampling_rounds)
            batches = tuple(self._batch(first + number) for number in rounds)
            self.show_memory(state, [(self._step, (state, batches, key))])
            return self._step(state, batches, key)
        draw_key, update_key = jax.random.split(key)
        self.show_memory(state, self._programs(state, self._batch(first), key))
        drawn, scored, number = None, list[Any](), 0
        while drawn is None or bool(is_unfinished(self.settings, drawn)):
            batch = self._batch(first + number)
            round_key = jax.random.fold_in(draw_key, number)
            responses = self._sample(state, batch, round_key)
            scores, parts = self._score(state, batch, responses)
            scored.append((scores, parts))
            groups = Groups(batch, responses, hosts.from_host(scores, self.batch_sharding))
            drawn = self._with_groups(nothing_drawn(groups) if drawn is None else drawn, groups)
            number += 1
        update = functools.partial(update_drawn, self.settings, self._update)
        state, metrics, output = update(state, drawn, update_key)
        scores, parts = jax.tree.map(lambda *x: np.concatenate(x), *scored)
        return state, metrics | self._means(scores, parts), output

    def _score(
        self, state: Any, batch: PromptBatch, responses: Rollout
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """f32[B, K], or f32[B, K, R] of R rewards that are normalized apart, and the parts."""
        scores, parts = super()._score(state, batch, responses)
        if self.config.settings.multi_objective_aggregation == "normalize_then_sum":
            names = self.rewards.names
            # A single one is the sum.
            columns = [parts[_PART + name] for name in names] if len(names) > 1 else [scores]
            scores = np.stack(columns, axis=-1).reshape(*scores.shape, -1).astype(np.float32)
        return scores, parts

    def _means(self, scores: Any, parts: dict[str, np.ndarray]) -> dict[str, Any]:
        """`rewards/NAME/mean` and `rewards/NAME/std` of each reward, of those that apply."""
        names = [] if self.training_judge is not None else self.rewards.names
        if len(names) == 1:
            parts = {_PART + names[0]: hosts.to_host(scores), **parts}
        metrics: dict[str, Any] = {}
        for name, mean in means_of_parts(parts).items():
            if not name.startswith(_PART):
                metrics[name] = mean
                continue
            values, name = parts[name], f"rewards/{name.removeprefix(_PART)}"
            metrics[f"{name}/mean"] = mean
            if np.sum(~np.isnan(values)) > 1:
                metrics[f"{name}/std"] = np.nanstd(values, ddof=1)
        return metrics

    def _reference_params(self, state: Any) -> Any:
        """The full parameters of the reference, read from the model's folder if none is held."""
        if self.config.settings.has_reference:
            return online.reference_params(self.model, state)
        _, params = load_model(self.config.model, self.tokenizer, self.key, self.mesh)
        return params

    def observe(self, output: Any) -> dict[str, float]:
        """As `OnlineStage.observe`; warns where no scores of a group differ for long."""
        rollout, _ = output
        scores = hosts.to_host(rollout.scores)
        has_spread = scores.shape[1] == 1 or (scores.max(axis=1) > scores.min(axis=1)).any()
        count = self._iterations_without_spread = (
            0 if has_spread else self._iterations_without_spread + 1
        )
        if count == PATIENCE and hosts.is_first():
            logger.warning(
                "In the last %d logged iterations all %d responses to every prompt had equal "
                "scores, from which %s learns nothing: see samples.jsonl, and use prompts that the "
                "policy answers right in part, a reward that grades responses, a higher "
                "%s.temperature or more %s.num_generations.",
                count,
                scores.shape[1],
                self.name,
                self.name,
                self.name,
            )
        return super().observe(output)
