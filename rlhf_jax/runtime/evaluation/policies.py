"""Evaluation of policies by their responses to held-out prompts, alone or before and after."""

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
from rlhf_jax.data.examples import source_of
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.rollout.score import end_scores, response_logprobs
from rlhf_jax.runtime.evaluation.diagnostics import with_interval
from rlhf_jax.runtime.evaluation.python_judge import JudgeFunction, judge_both_orders
from rlhf_jax.runtime.evaluation.rouge import ROUGE
from rlhf_jax.runtime.rewards.functions import ScoreFunction, call_scores
from rlhf_jax.runtime.rewards.scorers import Rewards
from rlhf_jax.runtime.rewards.texts import Responses
from rlhf_jax.runtime.run.folder import disk_errors, replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Sampler = Callable[[Params, PromptBatch, jax.Array], Rollout]


class EvaluatedResponses(NamedTuple):
    """One response to each of N prompts, with its scores.

    Attributes:
      prompts, responses: texts.
      kl: f32[N], summed log-ratio to the reference in nats, an estimate of KL(policy || reference),
        or None.
      lengths: i64[N], tokens, EOS included.
      scores: f32[N] by the rewards, or None.
      gold: f64[N], the gold score, or None.
      rouge: `rouge_scores` against the reference completions, or None.
    """

    prompts: list[str]
    responses: list[str]
    kl: np.ndarray | None
    lengths: np.ndarray
    scores: np.ndarray | None
    gold: np.ndarray | None
    rouge: Mapping[str, float] | None = None


class Comparison(NamedTuple):
    """Two policies on the same prompts.

    Attributes:
      before, after: the responses of both.
      metrics: means of the second, and its win rates over the first by the gold score, the score
        and a judge, as far as there are these; ties count half, each rate with its interval.
    """

    before: EvaluatedResponses
    after: EvaluatedResponses
    metrics: dict[str, float]


class PolicyEvaluator:
    """Samples one response to each prompt and scores them.

    Args:
      model: of the policy and, by default, of the reference.
      sample: (params, batch, key) -> Rollout, a pure function, or one that is called on the host.
      temperature: of the log-probabilities in the KL.
      reward_model: scores responses within the same compiled program; may be None.
      rewards: scores them otherwise, where no reward model is passed; may be None.
      gold_fn: the gold score; may be None.
      batch_size: prompts at a time.
      batch_sharding: of a batch on the mesh of the parameters, if that spans several hosts.
      samples_on_host: whether `sample` is called outside of the compiled program.
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
        gold_fn: ScoreFunction | None = None,
        batch_sharding: NamedSharding | None = None,
        samples_on_host: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.batch_sharding, self.gold_fn = batch_sharding, gold_fn
        self.rewards = None if reward_model is not None else rewards

        def evaluate(params, ref_params, reward_params, batch, rollout):
            sequences = Sequences(batch.prompts, batch.prompt_mask, rollout.tokens, rollout.mask)
            kl = scores = None
            if ref_params is not None:
                (logprobs, _, _), (ref_logprobs, _, _) = (
                    response_logprobs(*policy, sequences, temperature=temperature)
                    for policy in ((model, params), (reference_model or model, ref_params))
                )
                kl = jnp.sum(jnp.where(rollout.actions, logprobs - ref_logprobs, 0.0), axis=1)
            if reward_model is not None:
                scores = end_scores(reward_model, reward_params, sequences)
            return rollout, kl, scores

        def sample_and_evaluate(params, ref_params, reward_params, batch, key):
            rollout = sample(params, batch, key)
            return evaluate(params, ref_params, reward_params, batch, rollout)

        on_host = jax.jit(evaluate)

        def sample_first(params, ref_params, reward_params, batch, key):
            return on_host(params, ref_params, reward_params, batch, sample(params, batch, key))

        self._evaluate = sample_first if samples_on_host else jax.jit(sample_and_evaluate)

    def __call__(
        self,
        params: Params,
        prompts: PromptBatch,
        examples: list[dict[str, Any]],
        ref_params: Params | None,
        reward_params: Any,
        key: jax.Array,
    ) -> EvaluatedResponses:
        """Responses of the policy to all prompts; batch i is sampled with `fold_in(key, i)`.

        Args:
          prompts: NumPy arrays, of these examples.
          ref_params: of the reference; without them no KL is computed.
          reward_params: of the reward model, or the tuple of parameters of the rewards.
        """
        parts = []
        for index, batch in enumerate(eval_batches(prompts, self.batch_size)):
            batch_key = jax.random.fold_in(key, index)
            if self.batch_sharding is not None:
                batch = hosts.from_host(batch, self.batch_sharding)
            part = self._evaluate(params, ref_params, reward_params, batch, batch_key)
            parts.append(hosts.to_host(part))
        rollout, kl, scores = jax.tree.map(lambda *x: np.concatenate(x)[: len(examples)], *parts)
        responses = Responses(
            self.tokenizer,
            prompts.prompts,
            prompts.prompt_mask,
            [(rollout.tokens, rollout.mask)],
            columns_of(examples, prompts.indices),
            prompts.indices,
            self.model.stop_token_ids,
            turns_of(examples, prompts.indices),
        )
        if self.rewards is not None:
            scores, _ = self.rewards(reward_params or (), responses, self.batch_size)
        texts, gold = (responses.prompt_texts, responses.texts[0]), None
        if self.gold_fn is not None:
            gold = np.asarray(call_scores(self.gold_fn, *texts, responses.columns))
        return EvaluatedResponses(*texts, kl, rollout.actions.sum(axis=1), scores, gold)


def columns_of(examples: list[dict[str, Any]], indices: Any) -> dict[str, list[Any]]:
    """The columns of the data other than the prompt, as lists."""
    chosen = [source_of(examples[index]) for index in np.asarray(indices).tolist()]
    names = [name for name in chosen[0] if name != "prompt"]
    return {name: [example.get(name) for example in chosen] for name in names}


def turns_of(examples: list[dict[str, Any]], indices: Any) -> list[Any]:
    """The prompts as they stand in the data; None for those that are the beginning of a text."""
    return [examples[index].get("prompt") for index in np.asarray(indices).tolist()]


def compare(
    before: EvaluatedResponses,
    after: EvaluatedResponses,
    judge: JudgeFunction | None = None,
    columns: dict[str, list[Any]] | None = None,
) -> Comparison:
    """The second policy's means, and its win rates over the first.

    The judge, if any, gets the other columns of the data set by name.
    """
    rates: dict[str, float] = {}
    for name, old, new in (
        ("win_rate", before.gold, after.gold),
        ("win_rate_scores", before.scores, after.scores),
    ):
        if old is not None and new is not None:
            rates |= with_interval(name, (new > old) + 0.5 * (new == old))
    if judge is not None:
        texts = (after.prompts, before.responses, after.responses)
        verdicts = judge_both_orders(judge, *texts, columns or {})
        rates |= with_interval("win_rate_judge", verdicts.preferences)
        rates["judge_position_bias"] = verdicts.position_bias
    return Comparison(before, after, means(after) | rates)


def means(responses: EvaluatedResponses) -> dict[str, float]:
    """The mean metrics of one set of responses, by name."""
    names = ("scores", "gold", "kl", "response_length")
    columns = (responses.scores, responses.gold, responses.kl, responses.lengths)
    metrics = {n: float(np.mean(x)) for n, x in zip(names, columns, strict=True) if x is not None}
    return metrics | dict(responses.rouge or {})


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
    """Entries {"metric", "before", "after"} of the table, win rates with their "interval"."""
    before, after = means(comparison.before), comparison.metrics
    table = []
    for name, text in _NAMES.items():
        if name not in after:
            continue
        entry: dict[str, Any] = {"metric": text, "before": before.get(name), "after": after[name]}
        if f"{name}_low" in after:
            entry["interval"] = [after[f"{name}_low"], after[f"{name}_high"]]
        table.append(entry)
    return table


def evaluation_of(comparison: Comparison, num_samples: int) -> dict[str, Any]:
    """The content of `evaluation.json`: metrics, the table, and samples of both side by side."""
    before, after = comparison.before, comparison.after
    samples = {
        "prompt": before.prompts,
        "before": before.responses,
        "after": after.responses,
        "before_gold": before.gold,
        "after_gold": after.gold,
        "before_score": before.scores,
        "after_score": after.scores,
        "kl": after.kl,
    }
    return {
        "metrics": {**comparison.metrics, "num_prompts": len(before.prompts)},
        "table": table_of(comparison),
        "samples": first_entries(samples, num_samples),
    }


def evaluation_of_one(responses: EvaluatedResponses, num_samples: int) -> dict[str, Any]:
    """The content of `evaluation.json` of one policy, without a KL."""
    metrics = means(responses) | {"num_prompts": len(responses.prompts)}
    samples = {
        "prompt": responses.prompts,
        "response": responses.responses,
        "gold": responses.gold,
        "score": responses.scores,
    }
    return {
        "metrics": metrics,
        "table": [
            {"metric": _NAMES.get(name, "prompts"), "after": x} for name, x in metrics.items()
        ],
        "samples": first_entries(samples, num_samples),
    }


def first_entries(columns: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The first `count` entries of columns of texts and numbers, null where a column is None."""
    return [
        {
            name: None if x is None else x[i] if isinstance(x[i], str) else float(x[i])
            for name, x in columns.items()
        }
        for i in range(min(count, len(columns["prompt"])))
    ]


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
    """The content of `evaluation.json`, or None without the file."""
    file = epath.Path(run_dir) / "evaluation.json"
    return json.loads(file.read_text()) if file.exists() else None
