"""The command `evaluate` on models of one layer: its results, files and errors."""

import json
import logging
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import train_tokenizer
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.huggingface import save_pretrained, save_reward_model
from rlhf_jax.runtime import run_evaluate, train_sft
from rlhf_jax.runtime.config import EvaluateConfig, PPOConfig, SFTConfig, resolve
from rlhf_jax.runtime.evaluation.best_of import best_of_curve, pass_metrics
from rlhf_jax.runtime.evaluation.diagnostics import bootstrap_interval
from rlhf_jax.runtime.evaluation.policies import EvaluatedResponses, PolicyEvaluator
from rlhf_jax.runtime.evaluation.rouge import ROUGE, rouge_scores
from rlhf_jax.runtime.stages.offline import PolicyStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small
from tests.runtime.messages import message

EXAMPLES = [
    {"prompt": f"Film {n}:", "completion": f" It was {word}."}
    for n, word in enumerate(("good", "bad", "good and long"))
]
SHARED = {
    "generation": {"max_new_tokens": 3, "min_new_tokens": 3},
    "evaluation": {"batch_size": 2, "num_samples": 3},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `policy`, `reference` and `reward`, and the examples in `examples.jsonl`."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "examples.jsonl").write_text(
        "".join(json.dumps(example) + "\n" for example in EXAMPLES)
    )
    tokenizer = train_tokenizer(
        [example["prompt"] + example["completion"] for example in EXAMPLES], 280
    )
    config = GPT2Config(len(tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=1,
                        eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    model, keys = GPT2(config), jax.random.split(jax.random.key(0), 3)
    policy, reference, reward = (jax.tree.map(lambda x: 8 * x, model.init(key)) for key in keys)
    save_pretrained(folder / "policy", model, policy, tokenizer)
    save_pretrained(folder / "reference", model, reference, tokenizer)
    head = {"kernel": jnp.arange(8.0) - 3}
    save_reward_model(folder / "reward", model, {"model": reward, "head": head}, tokenizer)
    return folder


def evaluate(models, run_dir, kind="policy", evaluation=None, generation=None, data=None, **paths):
    """The evaluation of `policy` with its other models, as a dict."""
    config = {
        "kind": kind,
        "model": {name: str(models / folder) for name, folder in paths.items()},
        "data": {"path": str(models / "examples.jsonl"), "eval_rows": 0, "max_prompt_length": 24,
                 "max_length": 32, **(data or {})},
        "generation": SHARED["generation"] | (generation or {}),
        "evaluation": SHARED["evaluation"] | (evaluation or {}),
        "run_dir": str(run_dir),
    }  # fmt: skip
    result = run_evaluate(config)
    assert json.loads((run_dir / "evaluation.json").read_text()) == result
    return result


def gold(prompts, completions, completion):
    """The number of different letters that a response shares with the true completion."""
    return [float(len(set(a) & set(b))) for a, b in zip(completions, completion, strict=True)]


def by_length(prompts, responses_a, responses_b, completion):
    """A judge that reads the completions too, with a bias to the response shown second."""
    assert all(isinstance(text, str) for text in completion)
    return [0.2 + 0.6 * (len(b) > len(a)) for a, b in zip(responses_a, responses_b, strict=True)]


HERE = "tests.runtime.commands.test_evaluate"
JUDGE = f"{HERE}:by_length"
BOTH = {"path": "policy", "reference_path": "reference", "reward_path": "reward"}


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):
    """(folder, evaluation, responses) of the policy against the reference by all scores.

    The responses are one set of the policy, one of the reference, two more of the policy for the
    best of 3, and one more of the reference for pass@2.
    """
    folder, responses = tmp_path_factory.mktemp("compared"), []
    original = PolicyEvaluator.__call__

    def call(*arguments):
        responses.append(original(*arguments))
        return responses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyEvaluator, "__call__", call)
        settings = {"gold_fn": f"{HERE}:gold", "judge_fn": JUDGE, "best_of": [2, 1, 3]}
        settings |= {"num_responses": 2, "pass_threshold": 0.0}
        evaluation = evaluate(models, folder, evaluation=settings, **BOTH)
    assert len(responses) == 5
    return folder, evaluation, [responses[number] for number in (0, 3, 1, 2, 4)]


@pytest.mark.newest
def test_a_policy_is_compared_by_all_scores(compared):
    _, evaluation, (after, before, *_) = compared
    metrics = evaluation["metrics"]
    wins = (after.scores > before.scores) + 0.5 * (after.scores == before.scores)
    assert metrics["win_rate_scores"] == wins.mean()
    bounds = (metrics["win_rate_scores_low"], metrics["win_rate_scores_high"])
    assert bounds == bootstrap_interval(wins)
    preferences = [
        (0.2 + 0.6 * (len(b) > len(a)) + 0.8 - 0.6 * (len(a) > len(b))) / 2
        for a, b in zip(before.responses, after.responses)
    ]
    assert metrics["win_rate_judge"] == pytest.approx(np.mean(preferences))
    assert {"win_rate", "win_rate_low", "judge_position_bias"} <= metrics.keys()
    completions = [example["completion"] for example in EXAMPLES]
    assert {name: metrics[name] for name in ROUGE} == rouge_scores(after.responses, completions)
    table = {entry["metric"]: entry for entry in evaluation["table"]}
    started = rouge_scores(before.responses, completions)
    assert table["ROUGE-1 of responses"]["before"] == started["rouge1"]


def test_the_best_of_n_is_of_the_responses_of_one_policy(compared):
    folder, evaluation, (first, _, *others, _) = compared
    policy = [first, *others]
    texts = [tuple(each.responses) for each in policy]
    assert len(set(texts)) == 3
    scores, golds = (np.stack([getattr(x, name) for x in policy], 1) for name in ("scores", "gold"))
    assert evaluation["best_of"] == best_of_curve(scores, golds, [1, 2, 3])
    assert evaluation["best_of"][2]["scores"] == pytest.approx(scores.max(axis=1).mean())
    names = {entry["metric"] for entry in evaluation["table"]}
    assert "best of 3, gold score (KL at most 0.43 nats)" in names
    page = (folder / "report.html").read_text()
    for text in ("Best of n", "win rate by the judge", "Samples before and after"):
        assert text in page, text
    for text in ("metrics.jsonl", "Nothing was logged", "has no config.yaml"):
        assert text not in page, text


def test_pass_at_k_is_of_the_responses_of_each_policy(compared):
    folder, evaluation, (after, before, second, _, second_before) = compared
    for name, group in (("", (after, second)), ("before_", (before, second_before))):
        expected = pass_metrics(np.stack([each.scores for each in group], axis=1), 0.0)
        actual = {key: evaluation["metrics"][f"{name}{key}"] for key in expected}
        assert actual == expected
    entries = {entry["metric"]: entry for entry in evaluation["table"]}
    assert {"before", "after", "interval"} < entries["pass@2"].keys()
    sample = evaluation["samples"][0]
    (further,) = sample["further"]
    assert (sample["after"], further["response"]) == (after.responses[0], second.responses[0])
    assert "Response 2" in (folder / "report.html").read_text()


def test_the_configuration_is_written_but_not_over_that_of_a_run(compared, models, tmp_path):
    folder, _, _ = compared
    config = resolve(EvaluateConfig, folder / "config.yaml")
    assert (config.run_dir, config.evaluation.best_of) == (str(folder), (2, 1, 3))
    assert "reference_path: " in (folder / "report.html").read_text()

    shutil.copy(folder / "config.yaml", tmp_path)
    evaluate(models, tmp_path, "text", {"rouge_rows": 0}, path="policy")
    assert resolve(EvaluateConfig, tmp_path / "config.yaml").kind == "text"
    (tmp_path / "config.yaml").write_text("model: {path: null}\n")  # of a run of training
    evaluate(models, tmp_path, "text", {"rouge_rows": 0}, path="policy")
    assert (tmp_path / "config.yaml").read_text() == "model: {path: null}\n"


def test_texts_have_both_kinds_of_rouge_beside_the_loss(models, tmp_path, caplog, capsys):
    short = {"max_response_length": 4}  # responses are cut, which is logged once
    with caplog.at_level(logging.WARNING):
        result = evaluate(models, tmp_path, "text", data=short, path="policy")["metrics"]
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records) > 0
    assert {f"{name}{end}" for name in ROUGE for end in ("", "_published")} < result.keys()
    assert "ROUGE-Lsum, counted as published" in capsys.readouterr().out
    without = evaluate(models, tmp_path, "text", {"rouge_rows": 0}, data=short, path="policy")
    assert without["metrics"] == {
        name: result[name] for name in ("loss", "accuracy", "perplexity", "num_tokens")
    }


def test_the_stage_logs_the_rouge_of_the_command(models, tmp_path):
    data = {"eval_rows": 2, "max_response_length": 4}
    settings = {
        "model": {"path": str(models / "policy")},
        "data": {"path": str(models / "examples.jsonl"), "max_length": 32, **data},
        "sft": {"eval_batch_size": 2, "rouge_rows": 1},
        "generation": SHARED["generation"],
    }
    stage = PolicyStage(resolve(SFTConfig, settings))
    logged = stage.evaluate(stage.init_state())
    result = evaluate(models, tmp_path, "text", {"rouge_rows": 1}, data=data, path="policy")
    names = ("loss", "accuracy", "perplexity", *ROUGE)
    assert logged.keys() == {f"eval/{name}" for name in names}
    assert [logged[f"eval/{name}"] for name in names] == pytest.approx(
        [result["metrics"][name] for name in names], rel=1e-5
    )


@pytest.mark.parametrize(
    ("paths", "settings", "expected"),
    [
        ({}, {"evaluation": {"best_of": [1, 2]}}, "evaluation.best_of needs a score of each"),
        (
            {},
            {"evaluation": {"best_of": [0]}},
            "evaluation.best_of must hold numbers from 1 on, but",
        ),
        (
            {},
            {"evaluation": {"best_of": 4}},
            "evaluation.best_of must be a list such as [1, 2, 4], but is 4.",
        ),
        (
            {},
            {"evaluation": {"rouge_rows": -1}},
            "evaluation.rouge_rows must not be negative, but is",
        ),
        ({}, {"evaluation": {"judge_fn": JUDGE}}, "evaluation.judge_fn compares the responses of"),
        (
            BOTH,
            {"evaluation": {"best_of": [2]}, "generation": {"temperature": 0.0}},
            "evaluation.best_of needs responses that differ, and at generation.temperature 0 all",
        ),
        (BOTH, {"evaluation": {"judge_fn": "json:none"}}, "'json:none' names no function (module"),
    ],
)
def test_missing_settings_are_one_sentence(models, tmp_path, paths, settings, expected):
    paths = {"path": "policy", **paths}
    assert message(evaluate, models, tmp_path, **settings, **paths).startswith(expected)


@pytest.mark.parametrize("name", ["gold_fn", "judge_fn"])
def test_functions_are_imported_before_models_are_loaded(models, tmp_path, name):
    paths = {"path": "nowhere", "reference_path": "nowhere"}
    error = message(evaluate, models, tmp_path, evaluation={name: "json:none"}, **paths)
    assert error.startswith("'json:none' names no function (")


def test_a_reference_of_another_tokenizer_is_refused(models, tmp_path):
    """As many tokens, of which two have changed places."""
    shutil.copytree(models / "reference", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    paths = {"path": "policy", "reference_path": tmp_path / "other"}
    assert message(evaluate, models, tmp_path, **paths) == (
        f"model.reference_path {tmp_path}/other has another tokenizer than the policy, whose "
        "tokens it would misread; give a model that has the same one."
    )


def test_the_stage_needs_completions_to_compute_rouge(models, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "It was good."}\n' * 4)
    config = small.sft(
        tmp_path / "run",
        model={"path": str(models / "policy")},
        data={"path": str(tmp_path / "texts.jsonl"), "eval_rows": 2, "max_length": 16},
        sft={"rouge_rows": 1},
    )
    assert message(train_sft, config) == (
        "sft.rouge_rows compares with completions, which the held-out examples do not have: give "
        "prompts and completions, or set it to 0."
    )
    assert message(train_sft, {"sft": {"rouge_rows": -1}}) == (
        "sft.rouge_rows must not be negative, but is -1."
    )


def test_ppo_calls_the_judge(models, tmp_path):
    config = {
        "model": {"path": str(models / "policy"), "reward_path": str(models / "reward")},
        "data": {"path": str(models / "examples.jsonl"), "eval_rows": 1, "max_prompt_length": 24},
        "ppo": {"total_episodes": 2, "batch_size": 2, "num_mini_batches": 1, "response_length": 3},
        "evaluation": {"batch_size": 1, "judge_fn": JUDGE},
        "run_dir": str(tmp_path),
    }
    stage = OnlineStage(resolve(PPOConfig, config))
    one = np.ones(1)
    stage.evaluator = lambda params, *_: EvaluatedResponses(["p"], [params], one, one, one, None)
    state = SimpleNamespace(params={"model": "longer"}, frozen={"ref": "short"}, step=0)
    # (0.8 + 1 - 0.2) / 2: the longer response is the second one
    assert stage.evaluate(state)["eval/win_rate_judge"] == pytest.approx(0.8)
    state = SimpleNamespace(params={"model": "x"}, frozen={"ref": "short"}, step=1)
    assert stage.evaluate(state)["eval/win_rate_judge"] == pytest.approx(0.2)
