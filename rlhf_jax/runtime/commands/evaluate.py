"""The command `evaluate`: texts, pairs, or the responses of a policy."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.chat import are_messages, contents
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.pairs import encode_pairs
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.data.sft import encode_texts
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import check_batch_size
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.config import EvaluateConfig, resolve, to_yaml
from rlhf_jax.runtime.evaluation.best_of import best_of_curve, best_of_table
from rlhf_jax.runtime.evaluation.pairs import pair_evaluation, score_pairs
from rlhf_jax.runtime.evaluation.policies import (
    Comparison,
    Judged,
    PolicyJudge,
    Sampler,
    columns_of,
    compare,
    evaluation_of,
    evaluation_of_one,
    save_evaluation,
)
from rlhf_jax.runtime.evaluation.python_judge import judge_both_orders
from rlhf_jax.runtime.evaluation.responses import sampler
from rlhf_jax.runtime.evaluation.rouge import ROUGE, rouge_scores
from rlhf_jax.runtime.evaluation.teacher_forced import (
    TeacherForcedRouge,
    encode_completions,
    have_completions,
    published_metrics,
)
from rlhf_jax.runtime.report.page import format_table, holds_config_of_a_run, write_report
from rlhf_jax.runtime.rewards.scorers import find_sources, load_rewards
from rlhf_jax.runtime.run.metrics import disk_errors, replace_file
from rlhf_jax.training import reward, sft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run_evaluate(config: EvaluateConfig | str | Mapping[str, Any]) -> dict[str, Any]:
    """Evaluates a model on held-out rows; writes `evaluation.json` and `report.html`.

    Beside them is the configuration in `config.yaml`, unless that of a training run is there. A
    table is printed to standard output.

    Returns:
      The content of `evaluation.json`.

    Raises:
      InputError: one sentence about what is wrong with the configuration or the data.
    """
    config = resolve(EvaluateConfig, config)
    kinds = {"text": _evaluate_text, "pairs": _evaluate_pairs, "policy": _evaluate_policy}
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, "evaluation.batch_size", config.evaluation.batch_size)
    with jax.set_mesh(mesh):
        evaluation = kinds[config.kind](config)
    _save_config(config)
    save_evaluation(config.run_dir, evaluation)
    print(format_table(evaluation["table"]))
    print(f"evaluation: the report is in {write_report(config.run_dir)}", file=sys.stderr)
    return evaluation


def _save_config(config: EvaluateConfig) -> None:
    """Writes `config.yaml` over that of an earlier evaluation, but never over that of a run."""
    folder = epath.Path(config.run_dir)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not holds_config_of_a_run(folder):
            replace_file(folder / "config.yaml", to_yaml(config).encode())


def _evaluate_text(config: EvaluateConfig) -> dict[str, Any]:
    tokenizer, model, params = _load(config, config.model.path, "model.path")
    assemble.check_positions(model, config.data.max_length, "data.max_length")
    held_out = _held_out(config, "text")
    rows, _ = encode_texts(held_out, tokenizer, config.data)
    evaluate = jax.jit(sft.make_eval_step(model))
    batches = eval_batches(rows, config.evaluation.batch_size)
    sums = sum_metrics(evaluate(params, batch) for batch in batches)
    loss = sums["loss"] / sums["count"]
    metrics = {
        "loss": loss,
        "accuracy": sums["accuracy"] / sums["count"],
        "perplexity": perplexity(loss),
        "num_tokens": sums["count"],
    }
    judged = held_out[: config.evaluation.rouge_rows]
    if judged and have_completions(judged, config.data):
        metrics |= _teacher_forced(config, judged, tokenizer, model, params)
    table = [{"metric": _NAMES.get(name, name), "after": value} for name, value in metrics.items()]
    return {"metrics": metrics, "table": table, "samples": []}


_NAMES = {
    "loss": "loss (nats per token)",
    "num_tokens": "tokens",
    "loss_published": "loss, counted as published",
    **{name: f"ROUGE-{name[5:]}, teacher-forced" for name in ROUGE},
    **{f"{name}_published": f"ROUGE-{name[5:]}, counted as published" for name in ROUGE},
}


def _teacher_forced(
    config: EvaluateConfig,
    held_out: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    model: Model,
    params: Params,
) -> dict[str, float]:
    """ROUGE on the completions, and all as published."""
    rows = encode_completions(held_out, tokenizer, config.data)
    batch_size, max_length = config.evaluation.batch_size, config.data.max_length
    rouge = TeacherForcedRouge(model, tokenizer, rows, batch_size=batch_size)
    published = published_metrics(
        model, params, tokenizer, rows, max_length=max_length, batch_size=batch_size
    )
    return rouge(params) | published


def _evaluate_pairs(config: EvaluateConfig) -> dict[str, Any]:
    path = _required(config.model.reward_path, "model.reward_path")
    tokenizer = assemble.choose_tokenizer(config.tokenizer, path, list)
    mesh = make_mesh(config.mesh)
    model, params = assemble.load_scorer(path, config.model, tokenizer, mesh)
    model.check_mesh(mesh)
    assemble.check_positions(
        model,
        config.data.max_prompt_length + config.data.max_response_length,
        "data.max_prompt_length + data.max_response_length",
    )
    rows = encode_pairs(_held_out(config, "pairs"), tokenizer, config.data)
    step = jax.jit(reward.make_score_step(model))
    batches = eval_batches(rows, config.evaluation.batch_size)
    return pair_evaluation(score_pairs(lambda batch: step(params, batch), batches))


def _evaluate_policy(config: EvaluateConfig) -> dict[str, Any]:
    gold_fn, judge_fn = _check_policy(config)
    tokenizer, model, params = _load(config, config.model.path, "model.path")
    reference_model, ref_params = model, params
    if config.model.reference_path is not None:
        reference_model, ref_params = _load_reference(
            config.model.reference_path, config, tokenizer
        )
    rewards = reward_model = reward_params = None
    if sources := find_sources(config.model.reward_path, config.rewards):
        rewards, reward_params = load_rewards(
            sources, config.model, tokenizer, make_mesh(config.mesh)
        )
        reward_model = rewards.single
        reward_params = reward_params if reward_model is None else reward_params[0]
    rows = _held_out(config, "prompts")
    shared = {
        "temperature": config.generation.temperature or 1.0,
        "batch_size": config.evaluation.batch_size,
        "reference_model": reference_model,
        "reward_model": reward_model,
        "rewards": rewards,
        "gold_fn": gold_fn,
    }
    prompts, key = encode_prompts(rows, tokenizer, config.data), jax.random.key(config.seed)
    after = PolicyJudge(model, tokenizer, _sampler(model, tokenizer, config), **shared)
    answer = functools.partial(after, params, prompts, rows, ref_params, reward_params)
    judged = _with_rouge(answer(key), rows)
    curve = _best_of(answer, judged, key, config.evaluation.best_of)
    if config.model.reference_path is None:
        return _with_curve(evaluation_of_one(judged, config.evaluation.num_samples), curve)
    sample = _sampler(reference_model, tokenizer, config)
    before = PolicyJudge(reference_model, tokenizer, sample, **shared)
    others = (prompts, rows, ref_params, reward_params, key)
    started = _with_rouge(before(ref_params, *others), rows)
    comparison = _compare(judge_fn, started, judged, columns_of(rows, prompts.indices))
    return _with_curve(evaluation_of(comparison, config.evaluation.num_samples), curve)


def _check_policy(
    config: EvaluateConfig,
) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """The gold score and the judge, found before any model is loaded; None where none is named.

    Raises:
      InputError: a part of the evaluation lacks what it needs.
    """
    if config.evaluation.judge_fn is not None and config.model.reference_path is None:
        raise InputError(
            "evaluation.judge_fn compares the responses of two policies: give "
            "--model.reference_path the other one."
        )
    names = (config.evaluation.gold_fn, config.evaluation.judge_fn)
    gold_fn, judge_fn = (None if name is None else assemble.load_function(name) for name in names)
    best_of = bool(config.evaluation.best_of)
    if best_of and config.model.reward_path is None and not config.rewards:
        raise InputError(
            "evaluation.best_of needs a score to choose the best response by: give "
            "--model.reward_path a reward model, or --rewards a list of sources."
        )
    if best_of and config.generation.temperature == 0:
        raise InputError(
            "evaluation.best_of needs responses that differ, and at generation.temperature 0 all "
            "are the same: set it above 0."
        )
    return gold_fn, judge_fn


def _with_rouge(judged: Judged, rows: Sequence[Mapping[str, Any]]) -> Judged:
    """With the ROUGE of the responses, where all rows have a completion, of text or messages."""
    references = [row.get("completion") for row in rows]
    texts = [contents(x) for x in references if isinstance(x, str) or are_messages(x)]
    if len(texts) < len(rows):
        return judged
    return judged._replace(rouge=rouge_scores(judged.responses, texts))


def _best_of(
    answer: Callable[[jax.Array], Judged], first: Judged, key: jax.Array, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """The curve of the best of n responses, of which the first is there already."""
    if not sizes:
        return []
    judged = [first]
    for number in range(1, max(sizes)):
        # From the far end: the first numbers are those of the first response's batches.
        judged.append(answer(jax.random.fold_in(key, 2**31 - number)))
    scores = np.stack([each.scores for each in judged if each.scores is not None], axis=1)
    gold = [each.gold for each in judged if each.gold is not None]
    return best_of_curve(scores, np.stack(gold, axis=1) if gold else None, sizes)


def _with_curve(evaluation: dict[str, Any], curve: list[dict[str, Any]]) -> dict[str, Any]:
    if not curve:
        return evaluation
    table = [*evaluation["table"], *best_of_table(curve)]
    return {**evaluation, "table": table, "best_of": curve}


def _compare(
    judge: Callable[..., Any] | None,
    before: Judged,
    after: Judged,
    columns: dict[str, list[Any]],
) -> Comparison:
    if judge is None:
        return compare(before, after)
    texts = (before.prompts, before.responses, after.responses)
    return compare(before, after, judge_both_orders(judge, *texts, columns))


def _sampler(model: Model, tokenizer: PreTrainedTokenizerFast, config: EvaluateConfig) -> Sampler:
    needed = config.data.max_prompt_length + config.generation.max_new_tokens
    assemble.check_positions(model, needed, "data.max_prompt_length + generation.max_new_tokens")
    return sampler(model, tokenizer, config.generation)


def _load(config: EvaluateConfig, path: str | None, name: str):
    path = _required(path, name)
    tokenizer = assemble.choose_tokenizer(config.tokenizer, path, list)
    key, mesh = jax.random.key(config.seed), make_mesh(config.mesh)
    model, params = assemble.load_model(config.model, tokenizer, key, mesh)
    model.check_mesh(mesh)
    return tokenizer, model, params


def _load_reference(
    path: str, config: EvaluateConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[Model, Params]:
    """The policy to compare with, which has to read tokens as the other one writes them."""
    with assemble.local_folder(path) as folder:
        theirs = load_tokenizer(folder)
        shares_tokens = assemble.shares_tokens
        if not (shares_tokens(tokenizer, theirs) and shares_tokens(theirs, tokenizer)):
            raise InputError(
                f"model.reference_path {path} has another tokenizer than the policy, whose tokens "
                "it would misread; give a model that has the same one."
            )
        dtype, mesh = assemble.compute_dtype(config.model.dtype), make_mesh(config.mesh)
        model, params = load_pretrained(folder, dtype=dtype, mesh=mesh)
    assemble.check_vocabulary(model, tokenizer, path)
    return model, params


def _required(path: str | None, name: str) -> str:
    if path is None:
        raise InputError(f"This evaluation needs --{name}: a folder or hub name of a model.")
    return path


def _held_out(config: EvaluateConfig, kind: Any) -> list[dict[str, Any]]:
    """The held-out rows, or all where none are held out."""
    train, held_out = load_examples(config.data, kind)
    return held_out or train


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def sum_metrics(parts) -> dict[str, float]:
    """The sums of the metrics of several batches."""
    sums: dict[str, float] = {}
    for part in hosts.to_host(list(parts)):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums
