"""Judging responses on held-out prompts, before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from rlhf_jax.batches import PromptBatch, Rollout, Sequences
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.rollout.score import end_scores, response_logprobs
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.evaluation.bootstrap import bootstrap_interval
from rlhf_jax.runtime.evaluation.python_judge import Verdicts
from rlhf_jax.runtime.evaluation.responses import decode
from rlhf_jax.runtime.evaluation.rouge import ROUGE
from rlhf_jax.runtime.rewards.scorers import Responses, Rewards
from rlhf_jax.runtime.run.metrics import disk_errors, replace_file

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
      rouge: `rouge_scores` against the true completions; None without them.
    """

    prompts: list[str]
    responses: list[str]
    kl: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray | None
    gold: np.ndarray | None
    rouge: Mapping[str, float] | None = None


class Comparison(NamedTuple):
    """Two policies on the same prompts.

    Attributes:
      before, after: what each one answered.
      metrics: means of the second, and its win rates over the first: by the gold score, by the
        score and by a judge, each where there is one, ties half, with the ends of the interval.
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
      reward_model: what scores responses, in the same program; may be None.
      rewards: what scores them where no reward model does it alone; may be None.
      gold_fn: what scores them likewise, though nothing is trained on it; may be None.
      batch_size: prompts at a time.
      place: where a batch goes on the mesh of the parameters, if that spans several hosts.
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
        rewards: Rewards | None = None,
        gold_fn: assemble.ScoreFunction | None = None,
        place: NamedSharding | None = None,
    ) -> None:
        self.tokenizer, self.batch_size, self.place = tokenizer, batch_size, place
        self.rewards, self.gold_fn = None if reward_model is not None else rewards, gold_fn
        reference_model = reference_model or model

        def judge(params, ref_params, reward_params, batch, key):
            rollout = sample(params, batch, key)
            sequences = Sequences(batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
            logprobs, _, _ = response_logprobs(model, params, sequences, temperature=temperature)
            ref_logprobs, _, _ = response_logprobs(
                reference_model, ref_params, sequences, temperature=temperature
            )
            kl = jnp.sum(jnp.where(rollout.mask, logprobs - ref_logprobs, 0.0), axis=1)
            scores = None
            if reward_model is not None:
                scores = end_scores(reward_model, reward_params, sequences)
            return rollout, kl, scores

        self._judge = jax.jit(judge)

    def __call__(
        self,
        params: Params,
        rows: PromptBatch,
        columns: list[dict[str, Any]],
        ref_params: Params,
        reward_params: Any,
        key: jax.Array,
    ) -> Judged:
        """What the policy answers to all prompts; batch i is sampled with `fold_in(key, i)`.

        `reward_params` are those of the reward model, or the tuple that the rewards take.
        """
        parts = []
        for index, batch in enumerate(eval_batches(rows, self.batch_size)):
            batch_key = jax.random.fold_in(key, index)
            placed = batch if self.place is None else hosts.from_host(batch, self.place)
            part = self._judge(params, ref_params, reward_params, placed, batch_key)
            parts.append(hosts.to_host(part))
        rollout, kl, scores = jax.tree.map(lambda *x: np.concatenate(x)[: len(columns)], *parts)
        prompts = decode(self.tokenizer, rows.prompts, rows.prompt_mask)
        responses = decode(self.tokenizer, rollout.tokens, rollout.mask)
        extra = columns_of(columns, rows.indices)
        if self.rewards is not None:
            candidates = [(rollout.tokens, rollout.mask)]
            given = Responses(
                self.tokenizer, rows.prompts, rows.prompt_mask, candidates, extra, rows.indices
            )
            scores, _ = self.rewards(reward_params or (), given, self.batch_size)
        gold = None
        if self.gold_fn is not None:
            gold = np.asarray(assemble.call_scores(self.gold_fn, prompts, responses, extra))
        return Judged(prompts, responses, kl, rollout.mask.sum(axis=1), scores, gold)


def compare(before: Judged, after: Judged, verdicts: Verdicts | None = None) -> Comparison:
    """The second policy's means, and its win rates over the first.

    Args:
      verdicts: of a Python judge on the responses of both.
    """
    rates = _win_rates(before, after)
    if verdicts is not None:
        rates |= _with_interval("win_rate_judge", verdicts.preferences)
        rates["judge_position_bias"] = verdicts.position_bias
    return Comparison(before, after, means(after) | rates)


def means(judged: Judged) -> dict[str, float]:
    """The means that one set of responses has, by metric name."""
    columns = {
        "scores": judged.scores,
        "gold": judged.gold,
        "kl": judged.kl,
        "response_length": judged.lengths,
    }
    found = {name: float(np.mean(x)) for name, x in columns.items() if x is not None}
    return found | dict(judged.rouge or {})


def _win_rates(before: Judged, after: Judged) -> dict[str, float]:
    rates: dict[str, float] = {}
    for name, old, new in (
        ("win_rate", before.gold, after.gold),
        ("win_rate_scores", before.scores, after.scores),
    ):
        if old is not None and new is not None:
            rates |= _with_interval(name, (new > old) + 0.5 * (new == old))
    return rates


def _with_interval(name: str, wins: np.ndarray) -> dict[str, float]:
    """The mean of float[N] wins, and the ends of its 95 % bootstrap interval over prompts."""
    low, high = bootstrap_interval(wins)
    return {name: float(np.mean(wins)), f"{name}_low": low, f"{name}_high": high}


_NAMES = {
    "gold": "gold score",
    "scores": "score",
    "kl": "KL to the reference (nats per response)",
    "response_length": "response length (tokens)",
    "win_rate": "win rate by the gold score",
    "win_rate_scores": "win rate by the score",
    "win_rate_judge": "win rate by the judge",
    "judge_position_bias": "the judge's bias to the response shown second",
    **{name: f"ROUGE-{name[5:]} of responses" for name in ROUGE},
}


def table_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows {"metric", "before", "after"} of the before/after table, win rates with "interval"."""
    before, after = means(comparison.before), comparison.metrics
    rows = []
    for name, text in _NAMES.items():
        if name not in after:
            continue
        row: dict[str, Any] = {"metric": text, "before": before.get(name), "after": after[name]}
        if f"{name}_low" in after:
            row["interval"] = [after[f"{name}_low"], after[f"{name}_high"]]
        rows.append(row)
    return rows


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


def evaluation_of_one(judged: Judged, num_samples: int) -> dict[str, Any]:
    """The content of `evaluation.json` of one policy, of which no KL is known."""
    metrics = {name: value for name, value in means(judged).items() if name != "kl"}
    metrics["num_prompts"] = len(judged.prompts)
    rows = ((_NAMES.get(name), value) for name, value in metrics.items())
    samples = [
        {
            "prompt": judged.prompts[row],
            "response": judged.responses[row],
            "gold": _number(judged.gold, row),
            "score": _number(judged.scores, row),
        }
        for row in range(min(num_samples, len(judged.prompts)))
    ]
    return {
        "metrics": metrics,
        "table": [{"metric": text or "prompts", "after": value} for text, value in rows],
        "samples": samples,
    }


def save_evaluation(run_dir: str, evaluation: dict[str, Any]) -> None:
    """Writes the dict as `evaluation.json`, on the first host."""
    if not hosts.is_first():
        return
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
