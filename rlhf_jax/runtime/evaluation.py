"""Judging responses on held-out prompts, before and after; and the command `evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.datasets import load_rows
from rlhf_jax.data.pairs import pair_rows
from rlhf_jax.data.prompts import prompt_rows
from rlhf_jax.data.sft import text_rows
from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.runtime import assemble
from rlhf_jax.runtime.config import EvaluateConfig, resolve
from rlhf_jax.runtime.generation import decode, sampler
from rlhf_jax.runtime.metrics import disk_errors, replace_file
from rlhf_jax.runtime.pairs import pair_evaluation, score_pairs
from rlhf_jax.runtime.report import format_table
from rlhf_jax.training import ppo, reward, sft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Sampler = Callable[[Params, PromptBatch, jax.Array], Rollout]


class Judged(NamedTuple):
    """One response to each prompt, and what was found about it, rows first.

    Attributes:
      prompts, responses: texts.
      kl: f32[N], summed log-ratio to the reference in nats, an estimate of KL(policy || reference).
      lengths: i64[N], tokens, EOS included.
      scores: f32[N] of the reward model or reward function; None without one.
      gold: f32[N] of the gold score; None without one.
    """

    prompts: list[str]
    responses: list[str]
    kl: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray | None
    gold: np.ndarray | None


class Comparison(NamedTuple):
    """Two policies on the same prompts.

    Attributes:
      before, after: what each one answered.
      metrics: means of the second, and its win rate over the first (ties count half), by the gold
        score where there is one and else by the score.
    """

    before: Judged
    after: Judged
    metrics: dict[str, float]


class PolicyJudge:
    """Samples one response to each prompt and scores them all.

    Args:
      model: the form of the policy and, by default, of the reference.
      sample: (params, batch, key) -> Rollout.
      temperature: of the log-probs that the KL is measured with.
      reward_model, reward_fn, gold_fn: what scores responses; each may be None.
      batch_size: prompts at a time.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        sample: Sampler,
        *,
        temperature: float,
        batch_size: int,
        reference_model: Model | None = None,
        reward_model: Model | None = None,
        reward_fn: assemble.ScoreFunction | None = None,
        gold_fn: assemble.ScoreFunction | None = None,
    ) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.reward_fn, self.gold_fn = reward_fn, gold_fn
        reference_model = reference_model or model

        def judge(params, ref_params, reward_params, batch, key):
            rollout = sample(params, batch, key)
            parts = (batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
            logprobs, _, _ = ppo.response_logprobs(model, params, *parts, temperature=temperature)
            ref_logprobs, _, _ = ppo.response_logprobs(
                reference_model, ref_params, *parts, temperature=temperature
            )
            kl = jnp.sum(jnp.where(rollout.mask, logprobs - ref_logprobs, 0.0), axis=1)
            scores = None
            if reward_model is not None:
                scores = ppo.response_scores(reward_model, reward_params, batch, rollout)
            return rollout, kl, scores

        self._judge = jax.jit(judge)

    def __call__(
        self,
        params: Params,
        rows: PromptBatch,
        columns: list[dict[str, Any]],
        ref_params: Params,
        reward_params: Params | None,
        key: jax.Array,
    ) -> Judged:
        """What the policy answers to all prompts; batch i is sampled with `fold_in(key, i)`."""
        parts = []
        for index, batch in enumerate(eval_batches(rows, self.batch_size)):
            batch_key = jax.random.fold_in(key, index)
            part = self._judge(params, ref_params, reward_params, batch, batch_key)
            parts.append(jax.device_get(part))
        rollout, kl, scores = jax.tree.map(lambda *x: np.concatenate(x)[: len(columns)], *parts)
        prompts = decode(self.tokenizer, rows.prompts, rows.prompt_mask)
        responses = decode(self.tokenizer, rollout.tokens, rollout.mask)
        extra = columns_of(columns, rows.indices)
        if self.reward_fn is not None:
            scores = np.asarray(assemble.call_scores(self.reward_fn, prompts, responses, extra))
        gold = None
        if self.gold_fn is not None:
            gold = np.asarray(assemble.call_scores(self.gold_fn, prompts, responses, extra))
        return Judged(prompts, responses, kl, rollout.mask.sum(axis=1), scores, gold)


def compare(before: Judged, after: Judged) -> Comparison:
    """The second policy's means, and its win rate over the first."""
    return Comparison(before, after, _means(after) | _win_rates(before, after))


def _means(judged: Judged) -> dict[str, float]:
    columns = {
        "scores": judged.scores,
        "gold": judged.gold,
        "kl": judged.kl,
        "response_length": judged.lengths,
    }
    return {name: float(np.mean(x)) for name, x in columns.items() if x is not None}


def _win_rates(before: Judged, after: Judged) -> dict[str, float]:
    rates = {}
    for name, old, new in (
        ("win_rate", before.gold, after.gold),
        ("win_rate_scores", before.scores, after.scores),
    ):
        if old is not None and new is not None:
            rates[name] = float(np.mean((new > old) + 0.5 * (new == old)))
    return rates


_NAMES = {
    "gold": "gold score",
    "scores": "reward-model score",
    "kl": "KL to the reference (nats per response)",
    "response_length": "response length (tokens)",
    "win_rate": "win rate by the gold score",
    "win_rate_scores": "win rate by the reward model",
}


def table_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows {"metric", "before", "after"} of the before/after table."""
    before, after = _means(comparison.before), comparison.metrics
    return [
        {"metric": text, "before": before.get(name), "after": after[name]}
        for name, text in _NAMES.items()
        if name in after
    ]


def write_evaluation(run_dir: str, comparison: Comparison, num_samples: int) -> dict[str, Any]:
    """Writes `evaluation.json` and returns its content."""
    evaluation = evaluation_of(comparison, num_samples)
    save_evaluation(run_dir, evaluation)
    return evaluation


def evaluation_of(comparison: Comparison, num_samples: int) -> dict[str, Any]:
    """The content of `evaluation.json`: metrics, the table, and samples of both side by side."""
    before, after = comparison.before, comparison.after
    samples = [
        {
            "prompt": before.prompts[row],
            "before": before.responses[row],
            "after": after.responses[row],
            "before_gold": _number(before.gold, row),
            "after_gold": _number(after.gold, row),
            "before_score": _number(before.scores, row),
            "after_score": _number(after.scores, row),
            "kl": _number(after.kl, row),
        }
        for row in range(min(num_samples, len(before.prompts)))
    ]
    return {
        "metrics": {**comparison.metrics, "num_prompts": len(before.prompts)},
        "table": table_of(comparison),
        "samples": samples,
    }


def save_evaluation(run_dir: str, evaluation: dict[str, Any]) -> None:
    """Writes the dict as `evaluation.json`."""
    folder = epath.Path(run_dir)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(evaluation, indent=2, ensure_ascii=False)
        replace_file(folder / "evaluation.json", text.encode())


def read_evaluation(run_dir: str) -> dict[str, Any] | None:
    """The content of `evaluation.json`, or None where there is none."""
    file = epath.Path(run_dir) / "evaluation.json"
    return json.loads(file.read_text()) if file.exists() else None


def _number(values: np.ndarray | None, row: int) -> float | None:
    return None if values is None else float(values[row])


def columns_of(rows: list[dict[str, Any]], indices: Any) -> dict[str, list[Any]]:
    """The columns of these rows beside the prompt, as lists."""
    chosen = [rows[index] for index in np.asarray(indices).tolist()]
    names = [name for name in chosen[0] if name != "prompt"]
    return {name: [row.get(name) for row in chosen] for name in names}


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
        return _plain(_means(judged) | {"num_prompts": len(rows)})
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
