"""The report: its content by the files of a run, notes on missing ones, and no way to inject."""

import dataclasses
import html
import html.parser
import json
import re

import pytest
from etils import epath

from rlhf_jax import training
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.report import plots, stages
from rlhf_jax.runtime.report.page import csp_hash, write_report
from rlhf_jax.training.trainer import Headline
from tests.runtime.report.pages import ppo_lines, read, write_lines

EVIL = "<script>alert('x')</script>\"'><img src=http://evil.example/a.png onerror=alert(1)>"


@pytest.fixture
def full_run(tmp_path):
    run = tmp_path / "demo"
    sft = [{"step": s, "time": 1e9 + s, "train/loss": 3 / s} for s in range(1, 100)]
    write_lines(run / "sft/metrics.jsonl", [*sft, {"step": 99, "time": 1e9, "eval/loss": 1.25}])
    reward = [{"step": s, "time": 1e9 + s, "train/accuracy": 0.6} for s in range(1, 5)]
    write_lines(run / "reward/metrics.jsonl", [*reward, {"step": 4, "eval/accuracy": 0.625}])
    write_lines(run / "ppo/metrics.jsonl", ppo_lines())
    (run / "config.yaml").write_text("seed: 17 # <b>\n")
    evaluation = {
        "metrics": {"reward/accuracy": 0.625},
        "table": [{"metric": "gold score", "before": 0.25, "after": 1.75}],
        "samples": [
            {
                "prompt": "A prompt",
                "before": "The first answer",
                "after": "The second answer",
                "before_gold": 0.5,
                "after_gold": 1.5,
                "before_score": 1.0,
                "after_score": "NaN",
                "kl": 4.0,
            }
        ],
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


def test_a_full_run_shows_all_results(full_run):
    page = read(full_run)
    for text in (
        "demo", "Supervised fine-tuning", "Reward model", "PPO", "40 steps in 2 min",
        "SFT, held-out loss", "1.25", "Reward, held-out accuracy", "PPO, training gold score",
        "Score and gold score over KL", "gold score", "+1.5", "A prompt", "The first answer",
        "The second answer", "Policy loss", "Throughput", "my/own", "seed: 17 # <b>", "python",
    ):  # fmt: skip
        assert text in page.text, text
    assert not any(attributes.get("class") == "notes" for _, attributes in page.tags)


@pytest.mark.parametrize(
    ("section", "entries", "shown", "absent"),
    [
        ("sft", [{"step": 1, "eval/loss": 2.5}], "SFT, held-out loss", "Score and gold"),
        ("reward", [{"step": 1, "eval/accuracy": 0.7}], "Reward, held-out accuracy", "SFT"),
        ("ppo", ppo_lines(), "PPO, training gold score", "SFT"),
        (None, ppo_lines(), "Score and gold score over KL", "PPO"),
    ],
)
def test_a_single_stage_is_known_by_its_configuration(tmp_path, section, entries, shown, absent):
    write_lines(tmp_path / "metrics.jsonl", entries)
    if section:
        (tmp_path / "config.yaml").write_text(f"{section}:\n  batch_size: 4\n")
    page = read(tmp_path)
    assert shown in page.text
    assert absent not in page.text


def test_charts_of_single_trainers_are_those_of_their_records():
    trainers = {trainer.name: trainer for trainer in training.TRAINERS}
    titles = {
        name: [plot.title for plot in (*plots.main_plots(each), *plots.diagnostic_plots(each))]
        for name, each in trainers.items()
    }
    assert {"Policy loss", "Value loss", "Clipped share"} <= {*titles["ppo"]} - {*titles["grpo"]}
    assert "Response length" in {*titles["grpo"]} - {*titles["ppo"]}
    (scores,) = (plot for plot in plots.main_plots(trainers["rloo"]) if plot.title == "Score")
    assert list(scores.lines.items()) == [
        ("objective/scores", "training"),
        ("eval/scores", "held-out"),
        ("reward", "reward"),
    ]
    steps = [{"step": step, "reward": 1.0, "objective/kl": step} for step in (1, 2)]
    steps = [{**each, "objective/gold": 2.0} for each in steps]
    chart = plots.tradeoff_chart(trainers["grpo"], steps)
    assert [curve.label for curve in chart.curves] == ["reward", "gold score"]
    assert plots.tradeoff_chart(trainers["ppo"], steps) is None
    others = plots.other_plots(trainers["ppo"], [{"reward": [], "own": []}])
    assert [plot.title for plot in others] == ["own", "reward"]


def test_nothing_is_loaded_and_nothing_injected(full_run):
    folder = full_run / "x<i>"
    entries = [{"step": 1, EVIL: 1.0, "objective/kl": 1.0}]
    write_lines(folder / "metrics.jsonl", entries)
    sample = {"prompt": EVIL, "response": EVIL, "score": 1.0, EVIL: EVIL}
    write_lines(folder / "samples.jsonl", [{"step": 1, **sample}])
    (folder / "config.yaml").write_text(EVIL)
    entry = {"prompt": EVIL, "before": EVIL, "after": EVIL, "after_gold": EVIL}
    evaluation = {
        "metrics": {EVIL: EVIL},
        "table": [{"metric": EVIL, "after": EVIL}],
        "samples": [entry],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = read(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not {"img", "iframe", "object", "video", "i "} & {tag for tag, _ in page.tags}
    assert page.text.count("alert('x')") >= 10
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src") is None
        assert tag == "link" or re.fullmatch(r"#\w+|[\w.]+", attributes.get("href", "#x"))
        assert "url(" not in attributes.get("style", "")


def test_the_policy_of_the_page_allows_its_own_script_only(full_run):
    page = read(full_run)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert len(page.scripts) == 1
    assert f"'{csp_hash(page.scripts[0])}'" in policy
    text = (full_run / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ({}, "metrics.jsonl is missing"),
        ({"metrics.jsonl": ""}, "metrics.jsonl is empty"),
        (
            {"metrics.jsonl": '{"step": 1}\n?\n{"step": 2}\n'},
            "metrics.jsonl cannot be read: line 2",
        ),
        ({"evaluation.json": "{"}, "evaluation.json cannot be read"),
        ({"evaluation.json": "[1]"}, "evaluation.json holds no metrics"),
        ({"evaluation.json": '{"table": 3, "samples": [4]}'}, "evaluation.json holds no metrics"),
        (
            {"metrics.jsonl": '{"step": 1, "train/loss": "NaN"}\n'},
            "train/loss is not finite in 1 of 1",
        ),
        ({"samples.jsonl": '{"prompt": "no step"}\n'}, "metrics.jsonl is missing"),
        (
            {"metrics.jsonl": f'{{"step": 1, "train/loss": {10**400}}}\n'},
            "train/loss is not finite in 1 of 1",
        ),
        (
            {"evaluation.json": f'{{"metrics": {{"a": {10**400}}}, "table": []}}'},
            "ainf",
        ),
        ({"evaluation.json": "[" * 10**5}, "evaluation.json cannot be read"),
        ({"config.yaml": "run_dir: caf\udce9\n"}, "metrics.jsonl is missing"),
    ],
)
def test_missing_and_broken_files_are_named(tmp_path, files, note):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    assert note in read(tmp_path).text


def test_an_empty_stage_does_not_hide_the_others(full_run):
    (full_run / "reward/metrics.jsonl").write_text("")
    page = read(full_run)
    assert "reward/metrics.jsonl is empty" in page.text
    assert "Nothing was logged." in page.text
    assert "Score and gold score over KL" in page.text


def test_a_folder_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no run folder .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_tiles_are_held_out_numbers_under_their_own_name(tmp_path):
    lines = [
        {"step": 1, "objective/scores": 1.0, "objective/gold": 7.5, "eval/scores": 2.0},
        {"step": 2, "objective/scores": 3.0, "objective/gold": 8.5, "eval/scores": 4.0},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "config.yaml").write_text("ppo: {}\n")
    notes = []
    (place,) = stages.stage_folders(epath.Path(tmp_path))
    assert stages.tiles(stages.read_log(*place, notes)) == [
        ("PPO, training gold score", "8.5", "7.5"),
        ("PPO, held-out score", "4", "2"),
    ]


def test_the_header_has_command_seed_version_time_and_files(full_run):
    config = "# rlhf-jax 1.2.3: rlhf run --config 'a b.yaml'\nseed: 17\n"
    (full_run / "config.yaml").write_text(config)
    page = read(full_run)
    text = re.sub(r"\s+", " ", page.text)
    for shown in (
        "command rlhf run --config 'a b.yaml'", "seed 17", "rlhf-jax 1.2.3",
        "started 2001-09-09 01:46 UTC", "PPO 40 steps in 2 min",
    ):  # fmt: skip
        assert shown in text, shown
    addresses = [a["href"] for _, a in page.tags if "/" in a.get("href", "")]
    assert addresses == [f"{stage}/metrics.jsonl" for stage in ("sft", "reward", "ppo")]
    assert {"config.yaml", "evaluation.json"} <= {a.get("href") for _, a in page.tags}
    assert all((full_run / address).exists() for address in addresses)


def test_scores_are_those_before_scaling():
    lines = [
        {"step": 1, "objective/scores": 4.0, "objective/unscaled_scores": 1.5},
        {"step": 2, "objective/scores": 4.0},
    ]
    points = stages.series(stages.merge_steps(lines))
    assert points["objective/scores"] == [(1.0, 1.5), (2.0, 4.0)]


def test_lines_of_one_step_are_merged(tmp_path):
    """An evaluation may be logged after its step, even after later steps, and twice."""
    lines = [
        {"step": 1, "time": 1.0, "objective/scores": 1.0, "objective/kl": 0.5},
        {"step": 2, "time": 2.0, "objective/scores": 2.0, "objective/kl": 0.75},
        {"step": 1, "time": 3.0, "objective/gold": 4.0, "eval/kl": 0.25},
        {"step": 1, "time": 61.0, "objective/gold": 5.0},
        {"no": "step"},
    ]
    assert stages.series(stages.merge_steps(lines)) == {
        "objective/scores": [(1.0, 1.0), (2.0, 2.0)],
        "objective/kl": [(1.0, 0.5), (2.0, 0.75)],
        "objective/gold": [(1.0, 5.0)],
        "eval/kl": [(1.0, 0.25)],
    }
    write_lines(tmp_path / "metrics.jsonl", lines)
    page = read(tmp_path)
    assert "Score and gold score over KL" in page.text
    assert "2 steps in 60 s" in page.text


def test_stages_and_tiles_are_those_of_the_trainers(tmp_path, monkeypatch):
    """Read at call time; a folder without subfolders is known by the section of its trainer."""
    sft = next(trainer for trainer in training.TRAINERS if trainer.name == "sft")
    headlines = (Headline("eval/margin", "margin", shows_start=False),)
    other = dataclasses.replace(
        sft, name="best_pairs", title="Best pairs", label="BP", headlines=headlines
    )
    monkeypatch.setattr(training, "TRAINERS", (*training.TRAINERS, other))
    lines = [{"step": step, "eval/margin": step / 8} for step in (1, 2)]
    write_lines(tmp_path / "run/best_pairs/metrics.jsonl", lines)
    write_lines(tmp_path / "alone/metrics.jsonl", lines)
    (tmp_path / "alone/config.yaml").write_text("model:\n  sft: 1\nbest_pairs: {a: 1}\n")
    for name in ("run", "alone"):
        page = read(tmp_path / name)
        assert "Best pairs 2 steps" in re.sub(r"\s+", " ", page.text)
        assert "BP,held-outmargin0.25" in re.sub(r"\s+", "", page.text)
        assert "from 0.12" not in page.text
        assert "Reward model" not in page.text


def test_the_page_escapes_what_the_curves_are_called(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, 'a"b': 1.0}, {"step": 2, 'a"b': 2.0}])
    page = read(tmp_path)
    data = [a["data-chart"] for _, a in page.tags if "data-chart" in a]
    assert json.loads(data[0])["series"][0]["label"] == 'a"b'
    assert html.escape('a"b') not in page.text
