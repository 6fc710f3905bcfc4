"""Diagnostics of reward models against loops, and with a planted length bias."""

import json

import numpy as np
import pytest

from rlhf_jax.batches import PairBatch, RankingBatch
from rlhf_jax.runtime.evaluation import diagnostics, pairs
from rlhf_jax.runtime.report.page import write_report
from rlhf_jax.runtime.report.plots import pair_charts
from rlhf_jax.runtime.report.tables import format_table


@pytest.fixture
def scored():
    """(differences, length differences) of 300 pairs, with ties of both."""
    rng = np.random.default_rng(0)
    differences = rng.normal(0.3, 1.5, 300)
    differences[:7] = 0.0
    lengths = np.round(rng.normal(1, 6, 300)).astype(int)
    assert (lengths == 0).sum() > 3
    return differences, lengths


def planted(slope, count=4000):
    """Scores that follow the length with this slope, and true preferences as well.

    The longer response is the better one in about 56 % of the pairs, and what is good in a
    response the scores see as clearly for every slope.
    """
    rng = np.random.default_rng(1)
    lengths = np.round(rng.normal(2, 12, count)).astype(int)
    return rng.normal(0.8, 1.0, count) + slope * lengths, lengths


# --- by loops ------------------------------------------------------------------------------------


def test_the_reliability_curve_equals_a_loop(scored):
    differences, _ = scored
    bins = [[] for _ in range(10)]
    for difference in differences:
        sure = 1 / (1 + np.exp(-abs(difference)))
        right = 0.5 if difference == 0 else float(difference > 0)
        bins[min(int((sure - 0.5) / 0.05), 9)].append((sure, right))
    curve = diagnostics.calibration(differences)
    full = [(place, inside) for place, inside in enumerate(bins) if inside]
    assert len(curve) == len(full) > 5
    error = 0.0
    for result, (place, inside) in zip(curve, full, strict=True):
        sure, right = np.mean(inside, axis=0)
        expected = (0.5 + 0.05 * place, 0.55 + 0.05 * place, len(inside), sure, right)
        np.testing.assert_allclose(result, expected, rtol=1e-12)
        error += len(inside) / 300 * abs(right - sure)
    assert diagnostics.expected_calibration_error(curve) == pytest.approx(error)


def test_the_bounds_of_the_confidence_are_in_the_first_and_the_last_bin():
    first, last = diagnostics.calibration(np.array([0.0, 1e4, -1e4, 1e4, 800.0]))
    assert (first.low, first.num_pairs, first.correct) == (0.5, 1, 0.5)
    assert (last.high, last.num_pairs, last.confidence, last.correct) == (1.0, 4, 1.0, 0.75)


def test_scores_of_the_true_model_are_calibrated_and_doubled_ones_are_not():
    rng = np.random.default_rng(2)
    gaps = rng.normal(0, 1.5, 50_000)
    preferred = rng.random(50_000) < 1 / (1 + np.exp(-gaps))  # Bradley and Terry's preferences
    differences = np.where(preferred, gaps, -gaps)
    errors = [
        diagnostics.expected_calibration_error(diagnostics.calibration(scale * differences))
        for scale in (1.0, 2.0)
    ]
    assert errors[0] < 0.015
    assert errors[1] > 0.08


def test_accuracy_by_length_equals_a_loop(scored):
    differences, lengths = scored
    bins = diagnostics.accuracy_by_length(differences, lengths)
    for result in bins:
        inside = [
            (length, difference > 0)
            for difference, length in zip(differences, lengths, strict=True)
            if result.low <= length <= result.high
        ]
        assert result.num_pairs == len(inside)
        expected = np.mean(inside, axis=0)
        np.testing.assert_allclose((result.length_difference, result.accuracy), expected)
    # They hold every pair once, and lie the same on both sides of 0.
    assert sum(result.num_pairs for result in bins) == 300
    assert all(a.high + 1 == b.low for a, b in zip(bins, bins[1:], strict=False))
    ranges = [(result.low, result.high) for result in bins]
    assert (0, 0) in ranges
    assert len(ranges) == 9
    assert sorted((-high, -low) for low, high in ranges) == ranges


def test_the_metrics_equal_a_loop(scored):
    differences, lengths = scored
    margins = np.where(lengths > 3, 0.5, 0.0)
    metrics = diagnostics.pair_metrics(differences, lengths, margins)
    entries = list(zip(differences, lengths, margins, strict=True))
    half = {True: 0.5}
    unequal = [(d, n) for d, n, _ in entries if n != 0]
    expected = {
        "loss": np.mean([np.log1p(np.exp(m - d)) for d, _, m in entries]),
        "accuracy": np.mean([d > 0 for d, _, _ in entries]),
        "margin": np.mean([d for d, _, _ in entries]),
        "calibration_error": metrics["calibration_error"],
        "longer_wins": np.mean([half.get(n == 0, float(n > 0)) for _, n, _ in entries]),
        "prefers_longer": np.mean([half.get(d == 0, float((d > 0) == (n > 0)))
                                   for d, n in unequal]),
        "accuracy_where_longer": np.mean([d > 0 for d, n in unequal if n > 0]),
        "accuracy_where_shorter": np.mean([d > 0 for d, n in unequal if n < 0]),
    }  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in metrics.values())


def test_equal_lengths_have_no_metrics_of_length():
    metrics = diagnostics.pair_metrics(np.array([1.0, -1e4]), np.array([0, 0]))
    assert metrics.keys() == {"loss", "accuracy", "margin", "calibration_error", "longer_wins"}
    assert metrics["loss"] == pytest.approx(5000, rel=1e-3)
    (only,) = diagnostics.accuracy_by_length(np.array([1.0, -1.0]), np.array([0, 0]))
    assert only == (0, 0, 2, 0.0, 0.5)


# --- length bias ----------------------------------------------------------------------------------


def test_a_length_bias_shows():
    honest, biased = (diagnostics.pair_metrics(*planted(slope)) for slope in (0.0, 0.2))
    assert honest["longer_wins"] == biased["longer_wins"] == pytest.approx(0.56, abs=0.02)
    # The honest model prefers longer ones about as often as the data do, the other far oftener.
    assert abs(honest["prefers_longer"] - honest["longer_wins"]) < 0.06
    assert biased["prefers_longer"] > biased["longer_wins"] + 0.2
    gaps = [m["accuracy_where_longer"] - m["accuracy_where_shorter"] for m in (honest, biased)]
    assert abs(gaps[0]) < 0.05
    assert gaps[1] > 0.4
    flat, steep = (
        [result.accuracy for result in diagnostics.accuracy_by_length(*planted(slope))]
        for slope in (0.0, 0.2)
    )
    assert max(flat) - min(flat) < 0.15
    assert steep[0] < 0.1
    assert steep[-1] > 0.95


# --- from batches to the page --------------------------------------------------------------------


def test_pairs_of_batches_and_rankings_leave_inert_ones_out():
    length = np.array([[3, 1], [2, 2], [1, 4]])
    masks = np.arange(4) < length[..., None]
    tokens, nothing = np.ones((3, 4), int), np.zeros((3, 0), int)
    batch = PairBatch(nothing, nothing > 0, tokens, masks[:, 0], tokens, masks[:, 1],
                      np.array([0.5, 0.0, np.nan]), np.array([True, True, False]))  # fmt: skip
    scores = np.array([[1.0, 0.5], [0.25, 1.0], [np.nan, np.nan]])
    result = pairs.score_pairs(lambda _: scores, [batch])
    assert [x.tolist() for x in result] == [[0.5, -0.75], [2, 0], [0.5, 0.0]]

    lengths = np.array([[3, 1, 2], [2, 4, 0], [0, 0, 0]])
    mask = np.arange(4) < lengths[..., None]
    ranking = RankingBatch(nothing, nothing > 0, np.ones((3, 3, 4), int), mask)
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 1.0, np.nan], [np.nan] * 3])
    result = pairs.score_pairs(lambda _: scores, [ranking, ranking])
    assert result.differences.tolist() == [2.0, 1.0, -1.0, -1.0] * 2
    assert result.length_differences.tolist() == [2, 1, -1, -2] * 2
    assert not result.margins.any()


def test_the_page_and_the_table_show_the_curves(tmp_path, scored):
    evaluation = pairs.pair_evaluation(pairs.ScoredPairs(*scored, np.zeros(300)))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/margin": 0.1}\n')
    page = write_report(tmp_path).read_text()
    for text in ("Held-out pairs", "Calibration", "Accuracy by length", "rule: longer wins"):
        assert text in page, text
    table = format_table(pairs.curve_table(evaluation))
    assert "expected calibration error" in format_table(evaluation["table"])
    first = evaluation["pairs"]["calibration"][0]
    assert f"right, confidence 0.50 to 0.55 ({first['num_pairs']} pairs)" in table
    assert "preferred one as long (" in table
    charts = pair_charts(evaluation)
    drawn = [json.loads(chart.data)["series"][0]["points"] for chart in charts]
    for points, (key, x, y) in zip(
        drawn,
        (("calibration", "confidence", "correct"), ("lengths", "length_difference", "accuracy")),
        strict=True,
    ):
        expected = [(entry[x], entry[y]) for entry in evaluation["pairs"][key]]
        np.testing.assert_allclose(points, expected, rtol=1e-4)


def test_the_accuracy_has_a_bootstrap_interval_over_pairs(scored):
    evaluation = pairs.pair_evaluation(pairs.ScoredPairs(*scored, np.zeros(300)))
    correct, rng = scored[0] > 0, np.random.default_rng(3)
    means = [rng.choice(correct, size=len(correct)).mean() for _ in range(4000)]
    metrics = evaluation["metrics"]
    bounds = [metrics["accuracy_low"], metrics["accuracy_high"]]
    np.testing.assert_allclose(bounds, np.quantile(means, [0.025, 0.975]), atol=0.007)
    (entry,) = [each for each in evaluation["table"] if each["metric"] == "accuracy"]
    assert entry["interval"] == bounds
    assert entry["after"] == metrics["accuracy"] == correct.mean()
    assert [each["metric"] for each in evaluation["table"]].count("accuracy") == 1
    assert len(evaluation["table"]) == len(metrics) - 2  # the ends are in that entry


def test_the_page_of_all_stages_has_the_curves_of_the_reward_model(tmp_path, scored):
    evaluation = pairs.pair_evaluation(pairs.ScoredPairs(*scored, np.zeros(300)))
    for stage in ("sft", "reward"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.1}\n')
    assert "Held-out pairs" not in write_report(tmp_path).read_text()
    (tmp_path / "reward" / "evaluation.json").write_text(json.dumps(evaluation))
    assert write_report(tmp_path).read_text().count("Held-out pairs") == 1


@pytest.mark.parametrize(
    "content", [3, {}, {"calibration": 3}, {"lengths": [4, {"accuracy": "x"}]}]
)
def test_an_invalid_file_has_no_curves(content):
    assert pair_charts({"pairs": content, "metrics": content}) == ()
