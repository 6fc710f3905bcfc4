"""The command `evaluate`: texts, pairs, or the responses of a policy."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.chat import are_messages, contents
from rlhf_jax.data.comparisons import encode_pairs
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.data.sft import encode_texts
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import check_batch_size
from rlhf_jax.runtime import loading
from rlhf_jax.runtime.commands.generate import check_output
from rlhf_jax.runtime.config import EvaluateConfig, resolve
from rlhf_jax.runtime.evaluation import policies, teacher_forced
from rlhf_jax.runtime.evaluation.best_of import (
    best_of_curve,
    best_of_table,
    further_keys,
    with_passes,
)
from rlhf_jax.runtime.evaluation.pairs import curve_table, pair_evaluation, score_pairs
from rlhf_jax.runtime.evaluation.policies import EvaluatedResponses
from rlhf_jax.runtime.evaluation.responses import sampler
from rlhf_jax.runtime.evaluation.rouge import ROUGE, rouge_scores
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.report.stages import holds_config_of_a_run
from rlhf_jax.runtime.report.tables import format_table
from rlhf_jax.runtime.rewards.functions import load_function
from rlhf_jax.runtime.rewards.scorers import Rewards, find_sources, load_rewards
from rlhf_jax.runtime.run.folder import config_text, disk_errors, replace_file
from rlhf_jax.runtime.sampling.samples import check_sampled_positions
from rlhf_jax.training import reward, sft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run_evaluate(config: EvaluateConfig | str | Mapping[str, Any]) -> dict[str, Any]:
    """Evaluates a model on held-out examples; writes `evaluation.json` and `report.html`.

    It also writes the configuration to `config.yaml`, unless that of a training run is there, and
    prints a table to standard output.

    Returns:
      The content of `evaluation.json`.

    Raises:
      InputError: one sentence about a mistake in the configuration or the data.
    """
    config = resolve(EvaluateConfig, config)
    if sys.stdout is not None:
        check_output(None, "redirect it to a file that can be written")
    kinds = {"text": _evaluate_text, "pairs": _evaluate_pairs, "policy": _evaluate_policy}
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, "evaluation.batch_size", config.evaluation.batch_size)
    with jax.set_mesh(mesh):
        evaluation = kinds[config.kind](config, mesh)
    _save_config(config)
    policies.save_evaluation(config.run_dir, evaluation)
    curves = curve_table(evaluation) if config.kind == "pairs" else []
    print(format_table([*evaluation["table"], *curves]))
    print(f"evaluation: the report is in {write_report(config.run_dir)}", file=sys.stderr)
    return evaluation


def _save_config(config: EvaluateConfig) -> None:
    """Writes `config.yaml`, over that of an earlier evaluation but not over that of a run."""
    folder = epath.Path(config.run_dir)
    with disk_errors(folder, "give a --run_dir that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
        if not holds_config_of_a_run(folder):
            replace_file(folder / "config.yaml", config_text(config).encode())


def _evaluate_text(config: EvaluateConfig, mesh: Mesh) -> dict[str, Any]:
    tokenizer, model, params = _load_policy(config, mesh)
    loading.check_positions(model, config.data.max_length, "data.max_length")
    held_out, batch_size = _held_out(config, "text"), config.evaluation.batch_size
    texts = encode_texts(held_out, tokenizer, config.data)
    step = jax.jit(sft.make_eval_step(model))
    batches = eval_batches(texts, batch_size)
    sums = teacher_forced.sum_metrics(step(params, batch) for batch in batches)
    count = sums["count"]
    metrics = {name: sums[name] / count for name in ("loss", "accuracy")}
    metrics |= {"perplexity": teacher_forced.perplexity(metrics["loss"]), "num_tokens": count}
    examples = held_out[: config.evaluation.rouge_rows]
    if examples and teacher_forced.have_completions(examples, config.data):
        texts = teacher_forced.encode_completions(examples, tokenizer, config.data)
        rouge = teacher_forced.TeacherForcedRouge(model, tokenizer, texts, batch_size=batch_size)
        metrics |= rouge(params) | teacher_forced.published_metrics(
            model,
            params,
            tokenizer,
            texts,
            max_length=config.data.max_length,
            batch_size=batch_size,
        )
    table = [{"metric": _NAMES.get(name, name), "after": value} for name, value in metrics.items()]
    return {"metrics": metrics, "table": table, "samples": []}


_NAMES = {
    "loss": "loss (nats per token)",
    "num_tokens": "tokens",
    "loss_published": "loss, counted as published",
    **{name: f"ROUGE-{name[5:]}, teacher-forced" for name in ROUGE},
    **{f"{name}_published": f"ROUGE-{name[5:]}, counted as published" for name in ROUGE},
}


def _evaluate_pairs(config: EvaluateConfig, mesh: Mesh) -> dict[str, Any]:
    path = _required(config.model.reward_path, "model.reward_path")
    tokenizer = loading.choose_tokenizer(config.tokenizer, path, list)
    model, params = loading.load_scorer(path, config.model, tokenizer, mesh)
    loading.check_positions(
        model,
        config.data.max_prompt_length + config.data.max_response_length,
        "data.max_prompt_length + data.max_response_length",
    )
    pairs = encode_pairs(_held_out(config, "pairs"), tokenizer, config.data)
    step = functools.partial(jax.jit(reward.make_score_step(model)), params)
    return pair_evaluation(score_pairs(step, eval_batches(pairs, config.evaluation.batch_size)))


def _evaluate_policy(config: EvaluateConfig, mesh: Mesh) -> dict[str, Any]:
    gold_fn, judge_fn = _check_policy(config)
    tokenizer, model, params = _load_policy(config, mesh)
    reference = loading.load_reference(config.model, tokenizer, mesh)
    reference_model, ref_params = reference or (model, None)
    rewards = reward_params = None
    if sources := find_sources(config.model.reward_path, config.rewards):
        rewards, reward_params = load_rewards(sources, config.model, tokenizer, mesh)
        reward_params = reward_params if rewards.single is None else reward_params[0]
    settings, examples = config.evaluation, _held_out(config, "prompts")
    prompts, key = encode_prompts(examples, tokenizer, config.data), jax.random.key(config.seed)
    parts = (tokenizer, reference_model, rewards, gold_fn)
    inputs = (prompts, examples, ref_params, reward_params, key)
    count = max(settings.num_responses, *settings.best_of, 1)
    after = _responses(_evaluator(config, model, *parts), params, *inputs, count)
    after[0] = _with_rouge(after[0], examples)
    groups = {"after": after[: settings.num_responses]}
    if reference is None:
        evaluation = policies.evaluation_of_one(after[0], settings.num_samples)
    else:
        evaluator = _evaluator(config, reference_model, *parts)
        before = _responses(evaluator, ref_params, *inputs, settings.num_responses)
        before[0] = _with_rouge(before[0], examples)
        columns = policies.columns_of(examples, prompts.indices)
        comparison = policies.compare(before[0], after[0], judge_fn, columns)
        evaluation = policies.evaluation_of(comparison, settings.num_samples)
        groups["before"] = before
    if settings.num_responses > 1:
        evaluation = with_passes(evaluation, groups, settings.pass_threshold)
    if settings.best_of:
        curve = _best_of(after[: max(settings.best_of)], settings.best_of)
        evaluation["table"] += best_of_table(curve)
        evaluation["best_of"] = curve
    return evaluation


def _evaluator(
    config: EvaluateConfig,
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    reference_model: Model,
    rewards: Rewards | None,
    gold_fn: Callable[..., Any] | None,
) -> policies.PolicyEvaluator:
    """Of a policy; an InputError if its responses exceed its positions."""
    check_sampled_positions(model, config.data.max_prompt_length, config.generation)
    return policies.PolicyEvaluator(
        model,
        tokenizer,
        sampler(model, config.generation),
        temperature=config.generation.temperature or 1.0,
        batch_size=config.evaluation.batch_size,
        reference_model=reference_model,
        reward_model=None if rewards is None else rewards.single,
        rewards=rewards,
        gold_fn=gold_fn,
    )


def _responses(
    evaluator: policies.PolicyEvaluator,
    params: Params,
    prompts: PromptBatch,
    examples: list[dict[str, Any]],
    ref_params: Params | None,
    reward_params: Any,
    key: jax.Array,
    count: int,
) -> list[EvaluatedResponses]:
    """Several responses to each prompt; the KL is that of the first one alone."""
    return [
        evaluator(params, prompts, examples, None if n else ref_params, reward_params, each)
        for n, each in enumerate([key, *further_keys(key, count)])
    ]


def _check_policy(
    config: EvaluateConfig,
) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """(gold score, judge), imported before any model is loaded; None if the setting is null.

    Raises:
      InputError: a setting is missing that another one needs.
    """
    if config.evaluation.judge_fn is not None and config.model.reference_path is None:
        raise InputError(
            "evaluation.judge_fn compares the responses of two policies: give "
            "--model.reference_path the other one."
        )
    names = (config.evaluation.gold_fn, config.evaluation.judge_fn)
    gold_fn, judge_fn = (None if name is None else load_function(name) for name in names)
    several = {
        "best_of": bool(config.evaluation.best_of),
        "num_responses": config.evaluation.num_responses > 1,
    }
    for name in (name for name, is_set in several.items() if is_set):
        if config.model.reward_path is None and not config.rewards:
            raise InputError(
                f"evaluation.{name} needs a score of each response: give --model.reward_path a "
                "reward model, or --rewards a list of sources."
            )
        if config.generation.temperature == 0:
            raise InputError(
                f"evaluation.{name} needs responses that differ, and at generation.temperature 0 "
                "all are the same: set it above 0."
            )
    return gold_fn, judge_fn


def _with_rouge(
    responses: EvaluatedResponses, examples: Sequence[Mapping[str, Any]]
) -> EvaluatedResponses:
    """With the ROUGE of the responses, if all examples have a completion, of text or messages."""
    references = [example.get("completion") for example in examples]
    texts = [contents(x) for x in references if isinstance(x, str) or are_messages(x)]
    if len(texts) < len(examples):
        return responses
    return responses._replace(rouge=rouge_scores(responses.responses, texts))


def _best_of(responses: Sequence[EvaluatedResponses], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The curve of the best of n responses to each prompt."""
    scores = np.stack([each.scores for each in responses if each.scores is not None], axis=1)
    gold = [each.gold for each in responses if each.gold is not None]
    return best_of_curve(scores, np.stack(gold, axis=1) if gold else None, sizes)


def _load_policy(
    config: EvaluateConfig, mesh: Mesh
) -> tuple[PreTrainedTokenizerFast, Model, Params]:
    path, key = _required(config.model.path, "model.path"), jax.random.key(config.seed)
    tokenizer = loading.choose_tokenizer(config.tokenizer, path, list)
    return tokenizer, *loading.load_model(config.model, tokenizer, key, mesh)


def _required(path: str | None, name: str) -> str:
    if path is None:
        raise InputError(f"This evaluation needs --{name}: a folder or hub name of a model.")
    return path


def _held_out(config: EvaluateConfig, kind: Any) -> list[dict[str, Any]]:
    """The held-out examples, or all if none are held out."""
    train, held_out = load_examples(config.data, kind)
    return held_out or train
