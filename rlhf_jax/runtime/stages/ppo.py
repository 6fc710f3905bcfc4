"""The stage of PPO: `train_ppo`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.backend import compiler_options
from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.data.batching import Batches
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.data.sft import encode_texts
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.huggingface import save_pretrained
from rlhf_jax.models.interface import Model
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.distributed import join
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import (
    batch_sharding,
    check_batch_size,
    check_heads,
    replicated,
    tree_shardings,
)
from rlhf_jax.rollout.shaping import check_stop_tokens
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.compilation.ppo_flops import flops_per_text_token, flops_per_token
from rlhf_jax.runtime.config import PPOConfig, resolve
from rlhf_jax.runtime.evaluation.policies import (
    Comparison,
    Judged,
    PolicyJudge,
    columns_of,
    compare,
    write_evaluation,
)
from rlhf_jax.runtime.evaluation.python_judge import judge_both_orders
from rlhf_jax.runtime.evaluation.responses import decode
from rlhf_jax.runtime.rewards.scorers import Responses, find_sources, load_rewards, reference_tokens
from rlhf_jax.runtime.run import loop
from rlhf_jax.training import online, ppo
from rlhf_jax.training.state import make_optimizer
from rlhf_jax.training.trainable import check_num_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RewardFunction = Callable[..., list[float]]


def train_ppo(
    config: PPOConfig | str | Mapping[str, Any], reward_fn: RewardFunction | None = None
) -> loop.StageResult:
    """Trains a policy by PPO against reward models, Python functions, or a sum of several.

    Args:
      config: a `PPOConfig`, a YAML file, or a nested dict.
      reward_fn: f(prompts, completions, **columns) -> one number for each completion, columns being
        the other columns of the data set; it counts with weight 1 beside the sources of `rewards`,
        and is used instead of a `model.reward_path` that none of these stands for.

    Returns:
      The run folder, and the last value of each metric.

    Raises:
      InputError: one sentence about what is wrong with the configuration or the data.
    """
    config = resolve(PPOConfig, config)
    join(config.distributed)
    if config.num_seeds == 1:
        return loop.run(lambda: PPOStage(config, reward_fn), config)
    from rlhf_jax.runtime.stages.ppo_seeds import SeedsStage  # which is made of the stage below

    return loop.run(lambda: SeedsStage(config, reward_fn), config)


def check_sizes(config: PPOConfig, model: GPT2, mesh: Mesh) -> None:
    """Raises an InputError if responses exceed the model's positions, or batches miss the mesh.

    Likewise if a missing EOS has a price, and no response can have one; if more layers are to be
    trained than there are; and if there is nothing that the values could start from.
    """
    check_num_layers(model, config.ppo.num_layers_unfrozen, "ppo")
    value_path(config)
    check_stop_tokens(config.ppo, stop_token_ids=(0,))  # which one it is makes no difference here
    assemble.check_positions(
        model,
        config.data.max_prompt_length + config.ppo.response_length,
        "data.max_prompt_length + ppo.response_length",
    )
    check_heads(mesh, model.config.n_head)
    _check_parts(mesh, config.ppo, "batch_size", config.ppo.batch_size)
    if config.ppo.score_batch_size is not None:
        check_batch_size(mesh, "ppo.score_batch_size", config.ppo.score_batch_size)
    check_batch_size(mesh, "evaluation.batch_size", config.evaluation.batch_size)
    if config.ppo.ptx_coef:
        assemble.check_positions(model, config.ptx.max_length, "ptx.max_length")
        _check_parts(mesh, config.ppo, "ptx_batch_size", config.ppo.num_texts)


def _check_parts(mesh: Mesh, settings: ppo.Settings, name: str, rows: int) -> None:
    """Raises an InputError if the rows of an update, or of a part of it, miss the mesh."""
    steps = settings.gradient_accumulation_steps
    name = f"ppo.{name} / ppo.num_mini_batches"
    if steps > 1:
        name = f"{name} / ppo.gradient_accumulation_steps"
    check_batch_size(mesh, name, rows // settings.num_mini_batches // steps)


def check_scorer(config: PPOConfig, scorer: Model) -> None:
    """Raises an InputError if a reward model of tokens has too few positions for what it scores."""
    data, scored = config.data, "to be scored by the reward model,"
    lengths = {"ppo.response_length": config.ppo.response_length}
    if config.ppo.subtract_reference_score:
        lengths["data.max_response_length"] = data.max_response_length
    for name, length in lengths.items():
        what = f"data.max_prompt_length + {name}, {scored}"
        assemble.check_positions(scorer, data.max_prompt_length + length, what)


def value_path(config: PPOConfig) -> str | None:
    """Where the reward model is that a value model "reward" starts from; None for another one.

    Raises:
      InputError: there is none, or one is given that is not read.
    """
    model, reads_one = config.model, config.ppo.value_model == "reward"
    path = model.value_path or model.reward_path
    if reads_one and path is None:
        raise InputError(
            "ppo.value_model reward needs a reward model to start from: give --model.value_path "
            "its folder, or set ppo.value_model to policy or shared."
        )
    if not reads_one and model.value_path is not None:
        raise InputError(
            f"model.value_path is read by ppo.value_model reward alone, but that is "
            f"{config.ppo.value_model}; change one of them."
        )
    return path if reads_one else None


def value_label(config: PPOConfig) -> int | None:
    """The label of the classifier that the values start from: that of its source in `rewards`."""
    path = value_path(config)
    same = (source.label for source in config.rewards if source.path == path)
    bare = (source.label for source in config.rewards if source.is_bare)
    return next(same if config.model.value_path else bare, None)


def step_settings(config: PPOConfig, tokenizer: PreTrainedTokenizerFast) -> ppo.Settings:
    """The section `ppo` with `truncate_token` as an id.

    Raises:
      InputError: the tokenizer has no such token.
    """
    token = config.ppo.truncate_token
    if token is not None:
        token = assemble.find_token(tokenizer, token, "ppo.truncate_token")
    return dataclasses.replace(config.ppo, truncate_token=token)


def kind_of(config: PPOConfig) -> Kind:
    """The kind of rows that PPO reads."""
    return "references" if config.ppo.subtract_reference_score else "prompts"


class PPOStage:
    """What the loop needs of PPO; see `loop.Stage`."""

    name = "ppo"

    def __init__(self, config: PPOConfig, reward_fn: RewardFunction | None = None) -> None:
        self.config = config
        if config.model.path is None:
            raise InputError(
                "PPO starts from a trained policy: give --model.path a folder or hub name."
            )
        self.sources = find_sources(config.model.reward_path, config.rewards, reward_fn)
        if not self.sources:
            raise InputError(
                "PPO needs a reward: give --model.reward_path a reward model's folder, or "
                "--rewards a list of them and of functions, or call train_ppo with a reward_fn."
            )
        gold = config.evaluation.gold_fn
        self.gold_fn = None if gold is None else assemble.load_function(gold)
        judge = config.evaluation.judge_fn
        self.judge_fn = None if judge is None else assemble.load_function(judge)
        self._load()
        self._compile()

    def _load(self) -> None:
        config, data = self.config, self.config.data
        self.rows, self.held_out_rows = load_examples(data, kind_of(config))
        self.tokenizer = assemble.choose_tokenizer(config.tokenizer, config.model.path, list)
        self.settings = step_settings(config, self.tokenizer)
        init_key, self.key, self.eval_key = assemble.stage_keys(config.seed, "ppo", 3)
        self.mesh = make_mesh(config.mesh)
        self.model, self.params = assemble.load_model(
            config.model, self.tokenizer, init_key, self.mesh
        )
        check_sizes(config, self.model, self.mesh)
        for function in (*(each.function for each in self.sources), self.gold_fn):
            if function is not None:
                assemble.check_call(function, columns_of(self.rows, [0]))
        self._load_rewards()
        self._load_value()
        self.batches = Batches(
            encode_prompts(self.rows, self.tokenizer, data),
            config.ppo.batch_size,
            config.seed,
            buckets=data.length_buckets,
        )
        self.texts = self._load_texts() if config.ppo.ptx_coef else None
        self.held_out = (
            encode_prompts(self.held_out_rows, self.tokenizer, data) if self.held_out_rows else None
        )
        self.total_steps = config.ppo.num_iterations

    def _load_texts(self) -> Batches:
        """The texts of PPO-ptx, of which each iteration reads its own."""
        settings = self.config.ptx
        train, _ = load_examples(settings, "text")
        rows, _ = encode_texts(train, self.tokenizer, settings)
        # By another seed than the prompts, whose order would be the same if they are as many.
        return Batches(
            rows,
            self.config.ppo.num_texts,
            self.config.seed + 1,
            buckets=settings.length_buckets,
        )

    def _load_rewards(self) -> None:
        """One reward model is part of the whole step; others score between its two halves."""
        config, data = self.config, self.config.data
        self.rewards, params = load_rewards(
            self.sources, config.model, self.tokenizer, mesh=self.mesh
        )
        for scorer in self.rewards.token_models:
            check_scorer(config, scorer)
        self.references = None
        if config.ppo.subtract_reference_score:
            self.references = reference_tokens(self.rows, self.tokenizer, data)
        self.reward_model = self.rewards.single if self.references is None else None
        self.reward_params = params[0] if self.reward_model is not None else params or None

    def _load_value(self) -> None:
        """The reward model that the value model starts from, where it starts from one."""
        config, path = self.config, value_path(self.config)
        self.value_model, self.value_params = None, None
        if path is None:
            return
        self.value_model, self.value_params, theirs = assemble.load_reward(
            path, config.model, value_label(config), self.mesh
        )
        assemble.check_vocabulary(self.value_model, self.tokenizer, path)
        if not assemble.shares_tokens(self.tokenizer, theirs):
            raise InputError(
                f"The reward model in {path}, which the values are to start from, has another "
                "tokenizer than the policy: give --model.value_path one with the policy's, or set "
                "ppo.value_model to policy or shared."
            )
        assemble.check_positions(
            self.value_model,
            config.data.max_prompt_length + config.ppo.response_length,
            "data.max_prompt_length + ppo.response_length, to be valued by the value model,",
        )

    def _compile(self) -> None:
        config, stops = self.config, (self.tokenizer.eos_token_id,)
        self.optimizer = make_optimizer(config.optimizer, config.ppo.num_updates)
        given = (self.params, self.reward_params, self.value_params)
        shape = jax.eval_shape(self._init, *given)
        # Tokens are those of one run, however many runs the state holds.
        one = jax.eval_shape(functools.partial(PPOStage._init, self), *given)
        self.flops_per_token = flops_per_token(one, self.settings)
        self.flops_per_step = config.num_seeds * self._flops_of_texts(one)
        state, rows, whole = self._places(shape)
        self.rows_place = rows
        self.state_places = state
        made = {
            "optimizer": self.optimizer,
            "stop_token_ids": stops,
            "value_model": self.value_model,
        }
        if self.reward_model is not None:
            step = ppo.make_step(self.model, self.settings, reward_model=self.reward_model, **made)
            self._step = jax.jit(
                self._of_runs(step, 3, returns_state=True),
                in_shardings=(state, rows, whole),
                out_shardings=(state, whole, rows),
                donate_argnums=0,
                compiler_options=compiler_options(self.mesh.devices.flat[0].platform),
            )
        else:
            sample = ppo.make_rollout_step(self.model, self.settings, stop_token_ids=stops)
            self._sample = jax.jit(
                self._of_runs(sample, 3, returns_state=False),
                in_shardings=(state, rows, whole),
                out_shardings=rows,
            )
            update = ppo.make_update_step(self.model, self.settings, **made)
            self._update = jax.jit(
                self._of_runs(update, 5, returns_state=True),
                in_shardings=(state, rows, rows, rows, whole),
                out_shardings=(state, whole, rows),
                donate_argnums=0,
                compiler_options=compiler_options(self.mesh.devices.flat[0].platform),
            )
        self.judge = PolicyJudge(
            self.model,
            self.tokenizer,
            functools.partial(self._sample_for_judging, stops),
            temperature=config.ppo.temperature,
            reward_model=self.reward_model,
            rewards=self.rewards,
            gold_fn=self.gold_fn,
            batch_size=config.evaluation.batch_size,
            place=batch_sharding(self.mesh),
        )
        self._before: dict[int, Judged] = {}
        self._compared: tuple[int, Comparison] | None = None

    def _places(self, shape: ppo.PPOState) -> tuple[ppo.PPOState, Any, Any]:
        """The shardings of the state, of rows, and of what every device holds whole."""
        return tree_shardings(self.mesh, shape), batch_sharding(self.mesh), replicated(self.mesh)

    def _of_runs(self, function, num_arguments: int, *, returns_state: bool):
        """A function of one run, as it is compiled: here the same."""
        del num_arguments, returns_state
        return function

    def _flops_of_texts(self, state) -> float:
        """The texts of an iteration, on average, forwards and backwards in each epoch."""
        if self.texts is None:
            return 0.0
        tokens = np.mean((self.texts.examples.segments > 0).sum(axis=1)) * self.config.ppo.num_texts
        return flops_per_text_token(state, self.settings) * float(tokens)

    def _sample_for_judging(self, stops, params, batch, key):
        return online.sample_responses(
            self.model, params, batch, key, self.settings, stop_token_ids=stops
        )

    def _init(self, params, reward_params, value_params):
        return ppo.init_state(
            self.model,
            params,
            self.settings,
            self.key,
            optimizer=self.optimizer,
            reward_params=reward_params,
            value_params=value_params,
        )

    def init_state(self):
        """The state before the first iteration, sharded; the loaded parameters are let go."""
        init = jax.jit(self._init, out_shardings=self.state_places)
        state = init(self.params, self.reward_params, self.value_params)
        self.params = self.reward_params = self.value_params = None
        return state

    def step(self, state, index):
        """One iteration on batch number `index`; its output is the scored rollout and its rows."""
        batch, key = self._batch(index), self._key(index)
        if self.reward_model is not None:
            state, metrics, rollout = self._step(state, batch, key)
            return state, metrics, (rollout, batch.indices)
        sample_key, update_key = self._split(key)
        responses = self._sample(state, batch, sample_key)
        scores, parts = self._score(state, batch, responses)
        given = hosts.from_host(scores, self.rows_place)
        state, metrics, rollout = self._update(state, batch, responses, given, update_key)
        # Over the rows of a run, where there are several runs.
        means = {name: np.mean(values, axis=-1) for name, values in parts.items()}
        return state, {**metrics, **means}, (rollout, batch.indices)

    def _batch(self, index: int) -> PromptBatch:
        batch = assemble.batch_at(self.batches, index, self.rows_place)
        if self.texts is None:
            return batch
        return batch._replace(texts=assemble.batch_at(self.texts, index, self.rows_place))

    def _key(self, index: int) -> jax.Array:
        return jax.random.fold_in(self.key, index)

    def _split(self, key: jax.Array) -> jax.Array:
        return jax.random.split(key)

    def _score(
        self, state, batch: PromptBatch, responses: Rollout
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """f32[B] scores, and what they are made of, float[B] each."""
        if hosts.several():
            batch, responses = hosts.to_host((batch, responses))
        candidates = [(responses.tokens, responses.mask)]
        if self.references is not None:
            tokens, mask = self.references
            candidates.append((tokens[batch.indices], mask[batch.indices]))
        columns = columns_of(self.rows, batch.indices)
        given = Responses(
            self.tokenizer, batch.prompts, batch.prompt_mask, candidates, columns, batch.indices
        )
        at_once = self.config.ppo.score_batch_size or self.config.ppo.batch_size
        return self.rewards(state.frozen.get("reward", ()), given, at_once)

    def observe(self, output):
        """The gold score of the sampled responses, where there is one."""
        if self.gold_fn is None:
            return {}
        rollout, indices = output
        prompts = decode(self.tokenizer, rollout.prompts, rollout.prompt_mask)
        completions = decode(self.tokenizer, rollout.tokens, rollout.mask)
        columns = columns_of(self.rows, hosts.to_host(indices))
        gold = assemble.call_scores(self.gold_fn, prompts, completions, columns)
        return {"objective/gold": float(np.mean(gold))}

    def evaluate(self, state):
        """Scores, KL and gold scores on held-out prompts, against the policy PPO started from."""
        if self.held_out is None:
            return {}
        comparison = self._compare(state)
        return {f"eval/{name}": value for name, value in comparison.metrics.items()}

    def _compare(self, state) -> Comparison:
        """The comparison of this state, made once."""
        step = int(state.step)
        if self._compared is None or self._compared[0] != step:
            self._compared = (step, self._judge_both(state, self.eval_key))
        return self._compared[1]

    def _judge_both(self, state, key, run: int = 0) -> Comparison:
        """Policy against reference; what the reference answers in a run is kept by its number."""
        assert self.held_out is not None
        policy, ref = (of(self.model, state) for of in (ppo.policy_params, ppo.reference_params))
        judged = (self.held_out, self.held_out_rows, ref, state.frozen.get("reward"), key)
        if run not in self._before:
            self._before[run] = self.judge(ref, *judged)
        before, after = self._before[run], self.judge(policy, *judged)
        if self.judge_fn is None:
            return compare(before, after)
        columns = columns_of(self.held_out_rows, self.held_out.indices)
        texts = (after.prompts, before.responses, after.responses)
        return compare(before, after, judge_both_orders(self.judge_fn, *texts, columns))

    def samples(self, state, output, count):
        """Responses of the last iteration, with score and KL in nats."""
        rollout = hosts.to_host(output[0])
        prompts = decode(self.tokenizer, rollout.prompts[:count], rollout.prompt_mask[:count])
        texts = decode(self.tokenizer, rollout.tokens[:count], rollout.mask[:count])
        kl = (rollout.logprobs - rollout.ref_logprobs).sum(axis=1)
        return [
            {"prompt": prompt, "response": text, "score": float(score), "kl": float(nats)}
            for prompt, text, score, nats in zip(prompts, texts, rollout.scores, kl, strict=False)
        ]

    def saved(self, state):
        """All but the frozen parts, which are read from their own folders again; their checksum."""
        return assemble.saved_parts(state)

    def resumed(self, state, saved):
        """The saved parts beside the frozen ones, if these are still what they were."""
        rewards = [each.source.path for each in self.sources if each.source.path is not None]
        paths = [self.config.model.path, *rewards]
        return assemble.resumed_state(state, saved, self.config.run_dir, paths)

    def finish(self, state):
        """Writes `hf/` and, where there are held-out prompts, `evaluation.json`."""
        parts = (self.model, ppo.policy_params(self.model, state), self.tokenizer)
        assemble.export(self.config.run_dir, save_pretrained, *parts)
        if self.held_out is not None:
            count = self.config.evaluation.num_samples
            write_evaluation(self.config.run_dir, self._compare(state), count)
