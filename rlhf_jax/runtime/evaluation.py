"""The command `evaluate`: texts, pairs, or the responses of a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.datasets import load_rows
from rlhf_jax.data.pairs import pair_rows
from rlhf_jax.data.prompts import prompt_rows
from rlhf_jax.data.sft import text_rows
from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained
from rlhf_jax.models.interface import Model
from rlhf_jax.runtime import assemble
from rlhf_jax.runtime.config import EvaluateConfig, resolve
from rlhf_jax.runtime.generation import sampler
from rlhf_jax.runtime.judging import (
    PolicyJudge,
    Sampler,
    compare,
    means,
    save_evaluation,
    write_evaluation,
)
from rlhf_jax.runtime.pairs import pair_evaluation, score_pairs
from rlhf_jax.runtime.report import format_table
from rlhf_jax.training import reward, sft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run_evaluate(config: EvaluateConfig | str | Mapping[str, Any]) -> dict[str, Any]:
    """Evaluates a model on held-out rows; writes `evaluation.json` and prints a table.

    Returns:
      The content of `evaluation.json`.

    Raises:
      InputError: one sentence about what is wrong with the configuration or the data.
    """
    config = resolve(EvaluateConfig, config)
    kinds = {"text": _evaluate_text, "pairs": _evaluate_pairs, "policy": _evaluate_policy}
    evaluation = kinds[config.kind](config)
    save_evaluation(config.run_dir, evaluation)
    print(format_table(evaluation["table"]))
    return evaluation


def _evaluate_text(config: EvaluateConfig) -> dict[str, Any]:
    tokenizer, model, params = _load(config, config.model.path, "model.path")
    assemble.check_positions(model, config.data.max_length, "data.max_length")
    rows, _ = text_rows(_held_out(config, "text"), tokenizer, config.data)
    evaluate = jax.jit(sft.make_eval_step(model))
    batches = eval_batches(rows, config.evaluation.batch_size)
    sums = sum_metrics(evaluate(params, batch) for batch in batches)
    loss = sums["loss"] / sums["count"]
    return _plain(
        {
            "loss": loss,
            "accuracy": sums["accuracy"] / sums["count"],
            "perplexity": perplexity(loss),
            "num_tokens": sums["count"],
        }
    )


def _evaluate_pairs(config: EvaluateConfig) -> dict[str, Any]:
    path = _required(config.model.reward_path, "model.reward_path")
    tokenizer = assemble.choose_tokenizer(config.tokenizer, path, list)
    model, params = assemble.load_scorer(path, config.model, tokenizer)
    assemble.check_positions(
        model,
        config.data.max_prompt_length + config.data.max_response_length,
        "data.max_prompt_length + data.max_response_length",
    )
    rows = pair_rows(_held_out(config, "pairs"), tokenizer, config.data)
    step, params = jax.jit(reward.make_score_step(model)), jax.device_put(params)
    batches = eval_batches(rows, config.evaluation.batch_size)
    return pair_evaluation(score_pairs(lambda batch: step(params, batch), batches))


def _evaluate_policy(config: EvaluateConfig) -> dict[str, Any]:
    tokenizer, model, params = _load(config, config.model.path, "model.path")
    reference_model, ref_params = model, params
    if config.model.reference_path is not None:
        dtype = assemble.compute_dtype(config.model.dtype)
        reference_model, ref_params = load_pretrained(config.model.reference_path, dtype=dtype)
        assemble.check_vocabulary(reference_model, tokenizer, config.model.reference_path)
    reward_model = reward_params = None
    if config.model.reward_path is not None:
        reward_model, reward_params = assemble.load_scorer(
            config.model.reward_path, config.model, tokenizer
        )
    rows = _held_out(config, "prompts")
    gold = config.evaluation.gold_fn
    shared = {
        "temperature": config.generation.temperature or 1.0,
        "batch_size": config.evaluation.batch_size,
        "reference_model": reference_model,
        "reward_model": reward_model,
        "gold_fn": None if gold is None else assemble.load_function(gold),
    }
    prompts = prompt_rows(rows, tokenizer, config.data)
    others = (prompts, rows, ref_params, reward_params, jax.random.key(config.seed))
    after = PolicyJudge(model, tokenizer, _sampler(model, tokenizer, config), **shared)
    judged = after(params, *others)
    if config.model.reference_path is None:
        return _plain(means(judged) | {"num_prompts": len(rows)})
    sample = _sampler(reference_model, tokenizer, config)
    before = PolicyJudge(reference_model, tokenizer, sample, **shared)
    comparison = compare(before(ref_params, *others), judged)
    return write_evaluation(config.run_dir, comparison, config.evaluation.num_samples)


def _sampler(model: Model, tokenizer: PreTrainedTokenizerFast, config: EvaluateConfig) -> Sampler:
    needed = config.data.max_prompt_length + config.generation.max_new_tokens
    assemble.check_positions(model, needed, "data.max_prompt_length + generation.max_new_tokens")
    return sampler(model, tokenizer, config.generation)


def _load(config: EvaluateConfig, path: str | None, name: str):
    path = _required(path, name)
    tokenizer = assemble.choose_tokenizer(config.tokenizer, path, list)
    model, params = assemble.load_model(config.model, tokenizer, jax.random.key(config.seed))
    return tokenizer, model, jax.device_put(params)


def _required(path: str | None, name: str) -> str:
    if path is None:
        raise InputError(f"This evaluation needs --{name}: a folder or hub name of a model.")
    return path


def _held_out(config: EvaluateConfig, kind: Any) -> list[dict[str, Any]]:
    """The held-out rows, or all where none are held out."""
    train, held_out = load_rows(config.data, kind)
    return held_out or train


def _plain(metrics: dict[str, float]) -> dict[str, Any]:
    """An evaluation of one model: nothing to compare with."""
    table = [{"metric": name, "after": value} for name, value in metrics.items()]
    return {"metrics": metrics, "table": table, "samples": []}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def sum_metrics(parts) -> dict[str, float]:
    """The sums of the metrics of several batches."""
    sums: dict[str, float] = {}
    for part in jax.device_get(list(parts)):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums
