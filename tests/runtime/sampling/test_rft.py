"""Rejection sampling: what is selected, what is trained, and runs that are killed on the way."""

import json
import math
import shutil

import pytest

from rlhf_jax.runtime import train_rft, train_sft
from rlhf_jax.runtime.sampling.samples import ScoredSampler
from tests import small
from tests.runtime.messages import message


@pytest.fixture(scope="module")
def run(tmp_path_factory, sft_run):
    """A finished run, as (folder, result)."""
    folder = tmp_path_factory.mktemp("rft")
    return folder, train_rft(small.rft(folder, sft_run[0]))


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_best_response_to_each_prompt_is_trained_on_as_by_sft(tmp_path, sft_run, run):
    folder, result = run
    samples, selected = lines(folder / "sampled.jsonl"), lines(folder / "selected.jsonl")
    assert len(samples) == 12 * 3
    expected = []
    for start in range(0, 36, 3):
        group = samples[start : start + 3]
        assert len({each["prompt"] for each in group}) == 1
        scores = [-len(each["completion"]) / 10 for each in group]
        assert [each["score"] for each in group] == pytest.approx(scores)
        usable = [n for n, each in enumerate(group) if each["completion"].strip()]
        if usable:
            best = group[max(usable, key=lambda n: scores[n])]
            expected.append({k: best[k] for k in ("prompt", "completion", "score")})
    assert selected == expected
    assert len({each["completion"] for each in samples}) > 12

    data = {"path": str(folder / "selected.jsonl"), "eval_rows": 0}
    config = small.rft(tmp_path, sft_run[0], data=data, logging={"samples_every": 0})
    settings = config.pop("rft") | {"keep_truncated": None, "num_samples": None}
    config["sft"] = {key: value for key, value in settings.items() if value is not None}
    del config["rewards"]
    train_sft(config)
    names = ("train/loss", "train/grad_norm", "step")
    both = [[[line[n] for n in names] for line in small.entries(f / "metrics.jsonl")]
            for f in (folder, tmp_path)]  # fmt: skip
    assert both[0] == both[1]
    weights = [(f / "hf" / "model.safetensors").read_bytes() for f in (folder, tmp_path)]
    assert weights[0] == weights[1]

    evaluation = json.loads((folder / "evaluation.json").read_text())
    for each in evaluation["samples"]:
        assert each["before_score"] == pytest.approx(-len(each["before"]) / 10)
        assert each["after_score"] == pytest.approx(-len(each["after"]) / 10)
    assert evaluation["metrics"]["scores"] == result.metrics["eval/scores"]
    assert "Rejection sampling" in (folder / "report.html").read_text()


def test_a_run_killed_while_it_samples_continues_bit_for_bit(tmp_path, monkeypatch, sft_run, run):
    config = small.rft(tmp_path, sft_run[0])
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, ScoredSampler, "__call__", 3)
        with pytest.raises(KeyboardInterrupt):
            train_rft(config)
    file, complete = tmp_path / "sampled.jsonl", (run[0] / "sampled.jsonl").read_bytes()
    written = file.read_bytes()
    assert complete.startswith(written)
    assert written.count(b"\n") == 2 * 4 * 3
    file.write_bytes(complete[: len(written) - 10])  # in the middle of a line of the second batch
    train_rft(config)
    assert file.read_bytes() == complete
    small.assert_same_run(run[0], tmp_path, step=3)


@pytest.fixture
def copied(tmp_path, monkeypatch, run):
    """A folder with the responses of the run; no others can be sampled."""
    for name in ("sampled.jsonl", "sampled.json"):
        shutil.copy(run[0] / name, tmp_path / name)
    monkeypatch.setattr(ScoredSampler, "__call__", None)
    return tmp_path


def test_the_threshold_may_change_before_training_and_the_settings_of_sampling_not(copied, sft_run):
    def said(**sections):
        return message(train_rft, small.rft(copied, sft_run[0], **sections))

    before, best = (copied / "sampled.jsonl").read_bytes(), -math.inf
    best = max(each["score"] for each in lines(copied / "sampled.jsonl") if each["completion"])
    assert "threshold 5 or more: the best of the" in said(rft={"threshold": 5.0})
    assert f"has {best:g}; lower" in said(rft={"threshold": 6.0})  # in the same folder
    text = "holds responses with other settings or models: "
    assert text + "the seed is 0 there and 1 here; put that" in said(seed=1)
    assert text + "the number of responses to a prompt is 3 there and 2" in said(
        rft={"num_samples": 2}
    )
    assert text + "the SHA-256 of the prompts" in said(data={"max_prompt_length": 8})
    rewards = [{"function": "tests.small:short_response", "weight": 2.0}]
    assert text + "the rewards is [{" in said(rewards=rewards)
    (copied / "sampled.json").unlink()
    assert "sampled.json, with what they were sampled from, is missing or damaged" in said()
    assert (copied / "sampled.jsonl").read_bytes() == before


def nan_score(prompts, completions, **columns):
    return [math.nan] * len(prompts)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"path": None}}, "Rejection sampling starts from a trained policy: give"),
        ({"rewards": []}, "Rejection sampling needs a reward: give --model.reward_path a reward"),
        ({"rft": {"num_samples": 0}}, "rft.num_samples must be above 0, but is 0."),
        ({"generation": {"temperature": 0.0}}, "generation.temperature is 0, so that the 3 resp"),
        ({"generation": {"max_new_tokens": 60}}, "generation.max_new_tokens = 76 exceeds"),
        ({"data": {"max_response_length": 4}}, "generation.max_new_tokens = 8 exceeds data.max_r"),
        ({"rewards": [{"function": f"{__name__}:nan_score"}]}, "nan_score gave the score nan for"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path, sft_run, sections, said):
    assert said in message(train_rft, small.rft(tmp_path, sft_run[0], **sections))
