"""Tables of the report: evaluations, and several runs on one page."""

import json
import re

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.report import tables
from rlhf_jax.runtime.report.page import write_comparison
from tests.runtime.report.pages import Page, ppo_lines, read, write_lines


def test_format_table_aligns_values_of_json():
    entries = [
        {"metric": "gold score", "before": -0.5, "after": 1.25},
        {"metric": "KL", "before": 0, "after": "Infinity"},
        {"metric": "length", "before": 20000, "after": None},
        {"metric": "same", "before": 1, "after": 1},
    ]
    lines = tables.format_table(entries).splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["metric", "before", "after", "change"],
        ["-" * 10, "-" * 6, "-" * 5, "-" * 6],
        ["gold score", "-0.5", "1.25", "+1.75"],
        ["KL", "0", "inf", "+inf"],
        ["length", "20k", "–", "–"],
        ["same", "1", "1", "0"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert tables.format_table([]).splitlines()[0] == "metric  before  after  change"


def test_an_evaluation_of_one_model_has_one_column_and_no_number_twice(tmp_path):
    table = [{"metric": "gold score", "after": 0.25}, {"metric": "prompts", "after": 8}]
    assert tables.format_table(table).splitlines()[0] == "metric      value"
    evaluation = {
        "metrics": {"gold": 0.25, "num_prompts": 8},
        "table": table,
        "samples": [{"prompt": "A prompt", "response": "An answer", "gold": 1.5, "score": None}],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    text = read(tmp_path).text
    for shown in ("Evaluation", "gold score", "An answer", "1.50"):
        assert shown in text, shown
    for absent in ("efore", "change", "num_prompts"):
        assert absent not in text, absent
    evaluation["metrics"]["kl"] = 4.5  # a metric that the table leaves out
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert "num_prompts" not in read(tmp_path).text


def test_several_runs_are_on_one_page(tmp_path):
    for name, seed, slope in (("a", 0, 1.0), ("b", 1, 2.0)):
        lines = [{"step": s, "train/loss": slope * s, "eval/loss": slope} for s in range(1, 4)]
        write_lines(tmp_path / f"runs/{name}/sft/metrics.jsonl", lines)
        config = f"model: {{n_layer: 2}}\nseed: {seed}\nrun_dir: {name}\nsft: {{x: [1, {seed}]}}\n"
        (tmp_path / f"runs/{name}/sft/config.yaml").write_text(config)
    write_lines(tmp_path / "runs/b/ppo/metrics.jsonl", ppo_lines())
    paths = [tmp_path / "runs/a/sft", tmp_path / "runs/b/sft"]
    page = Page(write_comparison(paths, tmp_path / "both.html").read_text())
    text = re.sub(r"\s+", "", page.text)
    assert "2runs" in text
    assert "settinga/sftb/sftseed01sft.x[1,0][1,1]Supervised" in text
    assert "run_dir" not in text
    assert "n_layer" not in text
    assert "metrica/sftb/sftSFT,held-outloss12" in text
    charts = [json.loads(a["data-chart"]) for _, a in page.tags if "data-chart" in a]
    drawn = [[(x["label"], x["points"]) for x in chart["series"]] for chart in charts]
    assert drawn[0] == [
        ("a/sft", [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]),
        ("b/sft", [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]),
    ]
    assert "runs/a/sft/config.yaml" in [a.get("href") for _, a in page.tags]

    # A run without the stage keeps its colour.
    paths = [tmp_path / "runs/a", tmp_path / "runs/b"]
    page = Page(write_comparison(paths, tmp_path / "x.html").read_text())
    charts = [json.loads(a["data-chart"]) for _, a in page.tags if "data-chart" in a]
    assert [(x["label"], x["colour"]) for x in charts[-1]["series"]] == [("b", 1)]
    assert "a/config.yaml cannot be read" in page.text
    with pytest.raises(InputError, match="given twice"):
        write_comparison([tmp_path / "runs/a"] * 2, tmp_path / "x.html")
    with pytest.raises(InputError) as raised:
        write_comparison(paths, tmp_path / "missing/x.html")
    assert str(raised.value) == (
        f"cannot write to {tmp_path}/missing/x.html: No such file or directory; give --output a "
        "file that can be written"
    )
