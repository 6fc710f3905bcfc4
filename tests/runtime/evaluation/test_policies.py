"""Metrics of texts and scores against loops, enumeration and simulated data."""

import itertools
import json
import math
import sys

import numpy as np
import pytest

from rlhf_jax.errors import FunctionError, InputError
from rlhf_jax.runtime.evaluation import best_of, policies
from rlhf_jax.runtime.evaluation.diagnostics import bootstrap_interval
from rlhf_jax.runtime.evaluation.policies import EvaluatedResponses
from rlhf_jax.runtime.evaluation.python_judge import call_judge, judge_both_orders
from rlhf_jax.runtime.evaluation.rouge import rouge_scores
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.report.plots import best_of_charts
from rlhf_jax.runtime.report.tables import format_table

# --- ROUGE ---------------------------------------------------------------------------------------


def f1(shared, predicted, true):
    return 2 * shared / (predicted + true) if shared else 0.0


def ngram_f1(prediction, reference, n):
    """Each n-gram of the prediction strikes out one of the reference."""
    grams, left = (
        [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        for words in (prediction, reference)
    )
    total, shared = len(left), 0
    for gram in grams:
        if gram in left:
            left.remove(gram)
            shared += 1
    return f1(shared, len(grams), total)


def longest_common(a, b):
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


def test_rouge_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    texts = [rng.choice(list("abcd"), size=rng.integers(0, 8)).tolist() for _ in range(60)]
    pairs = list(zip(texts[:30], texts[30:], strict=True))
    result = rouge_scores(*([" ".join(words) for words in side] for side in zip(*pairs)))
    expected = {
        "rouge1": np.mean([ngram_f1(*pair, 1) for pair in pairs]),
        "rouge2": np.mean([ngram_f1(*pair, 2) for pair in pairs]),
        "rougeL": np.mean([f1(longest_common(*p), len(p[0]), len(p[1])) for p in pairs]),
    }
    assert expected["rouge2"] > 0.05
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in result.values())


def test_rouge_of_lines_and_of_words():
    result = rouge_scores(["c d\na b"], ["a b\nc d"])
    assert result == {"rouge1": 1.0, "rouge2": pytest.approx(1 / 3 * 2), "rougeL": 0.5,
                     "rougeLsum": 1.0}  # fmt: skip
    assert rouge_scores(["Runs, RUNS"], ["runs -- runs!"])["rouge2"] == 1.0
    assert rouge_scores(["running"], ["run"])["rouge1"] == 0.0  # no stemmer


# --- the bootstrap -------------------------------------------------------------------------------


def test_the_interval_equals_a_loop_and_all_resamples():
    values = np.array([0.0, 0.25, 0.5, 1.0])
    every = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
    expected = np.quantile(every, [0.025, 0.975])
    assert bootstrap_interval(values, num_resamples=100_000) == pytest.approx(expected, abs=0.001)

    wins = np.random.default_rng(1).choice([0.0, 0.5, 1.0], size=40, p=[0.3, 0.1, 0.6])
    rng, averages = np.random.default_rng(2), []
    for _ in range(4000):
        averages.append(np.mean([wins[rng.integers(40)] for _ in range(40)]))
    expected = np.quantile(averages, [0.05, 0.95])
    assert bootstrap_interval(wins, level=0.9) == pytest.approx(expected, abs=0.013)
    smooth = rng.random(20)
    assert bootstrap_interval(smooth) == bootstrap_interval(smooth)
    assert bootstrap_interval(smooth) != bootstrap_interval(smooth, seed=1)
    assert bootstrap_interval(np.ones(3)) == (1.0, 1.0)


def test_the_coverage_of_the_interval_is_nominal():
    rng, truth = np.random.default_rng(3), 0.7 + 0.5 * 0.1
    drawn = rng.choice([0.0, 0.5, 1.0], size=(600, 150), p=[0.2, 0.1, 0.7])
    ends = np.array([bootstrap_interval(entry, num_resamples=1000) for entry in drawn])
    held = np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
    assert held == pytest.approx(0.945, abs=0.025)
    width = 2 * 1.96 * np.std(drawn[0]) / math.sqrt(150)
    assert np.mean(ends[:, 1] - ends[:, 0]) == pytest.approx(width, rel=0.1)


# --- two policies --------------------------------------------------------------------------------


def evaluated(scores, gold=None, rouge=None):
    scores = np.asarray(scores, np.float32)
    texts = [f"text {n}" for n in range(len(scores))]
    lengths = np.ones(len(scores), int)
    return EvaluatedResponses(texts, texts, 0 * scores, lengths, scores, gold, rouge)


def test_win_rates_and_their_intervals_are_in_metrics_table_and_page(tmp_path):
    rng = np.random.default_rng(0)
    before, after = (rng.integers(0, 4, 60) + shift for shift in (0, 1))
    preferences = 0.125 + 0.75 * rng.random(60)
    answers = iter([preferences + 0.125, 1.125 - preferences])  # in both orders, biased by 0.125
    comparison = policies.compare(
        evaluated(before, np.zeros(60), {"rouge1": 0.25}),
        evaluated(after, np.ones(60), {"rouge1": 0.5}),
        lambda prompts, responses_a, responses_b, *, column: next(answers),
        {"column": [0] * 60},
    )
    wins = [1.0 if b > a else 0.5 if b == a else 0.0 for a, b in zip(before, after)]
    low, high = bootstrap_interval(np.array(wins))
    metrics = comparison.metrics
    assert (metrics["win_rate_scores"], metrics["win_rate"]) == (np.mean(wins), 1.0)
    assert (metrics["win_rate_scores_low"], metrics["win_rate_scores_high"]) == (low, high)
    assert low < np.mean(wins) < high
    assert (metrics["win_rate_low"], metrics["win_rate_high"]) == (1.0, 1.0)
    assert metrics["win_rate_judge"] == pytest.approx(np.mean(preferences))
    assert metrics["judge_position_bias"] == pytest.approx(0.125)

    evaluation = policies.evaluation_of(comparison, 2)
    policies.save_evaluation(str(tmp_path), evaluation)
    assert policies.read_evaluation(str(tmp_path)) == evaluation
    entries = {entry["metric"]: entry for entry in evaluation["table"]}
    assert entries["win rate by the score"]["interval"] == [low, high]
    assert (
        entries["ROUGE-1 of responses"]["before"],
        entries["ROUGE-1 of responses"]["after"],
    ) == (
        0.25,
        0.5,
    )
    text = format_table(evaluation["table"])
    assert f"{np.mean(wins):.4g} ({low:.4g} to {high:.4g})" in text
    page = write_report(tmp_path).read_text()
    assert f"({low:.4g} to {high:.4g})" in page
    assert "metrics.jsonl" not in page  # an evaluation alone lacks nothing
    assert "Supervised fine-tuning" not in page


@pytest.mark.parametrize("interval", [3, [1], ["a", "b"], None, [0.1, None]])
def test_an_invalid_interval_is_left_out(interval):
    table = format_table([{"metric": "x", "after": 0.5, "interval": interval}])
    assert table.splitlines()[-1].split() == ["x", "0.5"]


# --- a judge in Python ---------------------------------------------------------------------------


def prefers_long(prompts, responses_a, responses_b, bonus):
    """Prefers the longer response, with a bias to the one shown second."""
    lengths = zip(responses_a, responses_b, bonus, strict=True)
    return [0.6 * (len(b) > len(a)) + 0.3 * (len(b) == len(a)) + more for a, b, more in lengths]


def test_the_bias_of_a_judge_cancels_over_both_orders():
    verdicts = judge_both_orders(
        prefers_long, list("pqr"), ["a", "bb", "cc"], ["aaa", "b", "dd"], {"bonus": [0.4, 0.2, 0.0]}
    )
    # (f(before, after) + 1 - f(after, before)) / 2, whatever is added to both
    np.testing.assert_allclose(verdicts.preferences, [0.8, 0.2, 0.5])
    answers = np.array([[1.0, 0.4], [0.2, 0.8], [0.3, 0.3]])
    assert verdicts.position_bias == pytest.approx(answers.mean() - 0.5)


def test_a_judge_of_positions_alone_finds_a_tie():
    verdicts = judge_both_orders(lambda p, a, b: [1.0] * len(p), ["p"], ["a"], ["b"], {})
    assert (verdicts.preferences.tolist(), verdicts.position_bias) == ([0.5], 0.5)


def raises(prompts, responses_a, responses_b):
    raise KeyError("two\nlines")


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (lambda p, a, b: [0.5], "gave 1 answers for 2 prompts; it has to give one number from 0"),
        (lambda p, a, b: [0.5, 1.5], "gave 1.5 for the prompt 'q'; it has to give one number"),
        (lambda p, a, b: [-0.1, 1.0], "gave -0.1 for the prompt 'p'; it has to give"),
        (lambda p, a, b: [0.5, math.nan], "gave nan for the prompt 'q'; it has to give"),
        (lambda p, a, b: ["0.5", "B"], "gave ['0.5', 'B']; it has to give one number from 0 (a"),
        (lambda p, a, b: None, "gave None; it has to give one number"),
        (lambda p, a, b: {0.5, 1.0}, "it has to give one number from 0 (a"),
        (
            lambda p, a, b: itertools.repeat(0.5),
            "gave more than 2 answers for 2 prompts; it has to",
        ),
        (lambda p, a, b: [10**400, 0.5], "gave inf for the prompt 'p'; it has to give one number"),
        (lambda p, a, b: sys.exit(0), "ends the program by sys.exit(0)."),
        (lambda p, a, b: [None, 0.5], "gave [None, 0.5]; it has to give"),
    ],
)
def test_wrong_answers_of_a_judge_are_one_sentence(judge, expected):
    with pytest.raises(InputError) as error:
        call_judge(judge, ["p", "q"], ["a", "b"], ["c", "d"], {})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("judge", "kind"), [(raises, KeyError), (lambda p, a: [0.5], TypeError)])
def test_an_exception_of_a_judge_is_one_sentence(judge, kind):
    with pytest.raises(FunctionError) as error:
        call_judge(judge, ["p", "q"], ["a", "b"], ["c", "d"], {})
    assert isinstance(error.value.__cause__, kind)
    assert str(error.value).startswith(f"The judge {judge.__name__} ")
    assert f" raised {kind.__name__}: " in str(error.value)


def test_a_judge_may_answer_with_an_array():
    result = call_judge(
        lambda p, a, b: np.array([True, False]), ["p", "q"], ["a"] * 2, ["b"] * 2, {}
    )
    assert result.tolist() == [1.0, 0.0]


# --- best of n -----------------------------------------------------------------------------------


def chosen_by_enumeration(proxy, scores, n):
    """The mean over all subsets of n, of the best by the proxy; ties are drawn."""
    result = []
    for entry, values in zip(proxy, scores, strict=True):
        for subset in itertools.combinations(range(len(entry)), n):
            top = max(entry[i] for i in subset)
            result.append(np.mean([values[i] for i in subset if entry[i] == top]))
    return np.mean(result)


def test_pass_at_k_is_the_mean_over_all_subsets():
    scores = np.random.default_rng(0).normal(size=(7, 6))
    metrics = best_of.pass_metrics(scores, threshold=1.0)
    assert {*metrics} >= {"pass@1", "pass@2", "pass@4", "pass@6"}
    for k in (1, 2, 4, 6):
        subsets = [list(each) for each in itertools.combinations(range(6), k)]
        solved = np.array([[(row[each] >= 1.0).any() for each in subsets] for row in scores])
        assert metrics[f"pass@{k}"] == pytest.approx(solved.mean(), abs=1e-6)
        assert metrics[f"pass@{k}_low"] <= metrics[f"pass@{k}"] <= metrics[f"pass@{k}_high"]
    assert best_of.pass_metrics(np.ones((3, 1)), threshold=1.0)["pass@1"] == 1.0


def test_the_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    smooth, gold = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    tied = rng.integers(0, 3, size=(3, 6)).astype(float)
    tied[0] = 1.0
    for proxy in (smooth, tied):
        for scores in (gold, proxy):
            result = best_of.best_of_means(proxy, scores, range(1, 7))
            expected = [chosen_by_enumeration(proxy, scores, n) for n in range(1, 7)]
            np.testing.assert_allclose(result, expected, rtol=1e-12)
    np.testing.assert_allclose(best_of.best_of_means(smooth, smooth, [6]), smooth.max(1).mean())


def test_the_curve_is_unbiased_and_its_kl_that_of_chosen_responses():
    # Responses are uniform numbers from 0 to 1, and their own scores: the best of n is beta(n, 1).
    uniform = np.random.default_rng(1).random((4000, 8))
    for entry in best_of.best_of_curve(uniform, None, [8, 1, 4, 4, 2]):
        n = entry["n"]
        assert entry["scores"] == pytest.approx(n / (n + 1), abs=0.01)
        x = (np.arange(20_000) + 0.5) / 20_000
        density = n * x ** (n - 1)
        assert entry["kl"] == pytest.approx(np.mean(density * np.log(density)), abs=1e-3)


def test_the_curve_is_in_table_and_page(tmp_path):
    rng = np.random.default_rng(2)
    curve = best_of.best_of_curve(rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), [4, 1, 2])
    assert [entry["n"] for entry in curve] == [1, 2, 4]
    table = best_of.best_of_table(curve)
    assert table[1] == {
        "metric": "best of 2, score (KL at most 0.19 nats)",
        "after": curve[1]["scores"],
    }
    evaluation = {"metrics": {}, "table": table, "samples": [], "best_of": curve}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(tmp_path).read_text()
    assert "Best of n" in page
    assert "n = 1, 2, 4" in page
    (chart,) = best_of_charts(evaluation)
    drawn = [series["points"] for series in json.loads(chart.data)["series"]]
    for points, key in zip(drawn, ("scores", "gold"), strict=True):
        np.testing.assert_allclose(
            points, [(entry["kl"], entry[key]) for entry in curve], rtol=1e-4
        )


@pytest.mark.parametrize("content", [3, [], [4, {"n": 1}], {"n": 2}, [{"kl": "x", "scores": 1}]])
def test_an_invalid_file_has_no_best_of_curve(content):
    assert best_of_charts({"best_of": content}) == ()
