"""`rlhf pairs sample`: the best and the worst of the responses to each prompt."""

import json

import pytest

from rlhf_jax.data import load_examples
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.runtime import run_pairs
from rlhf_jax.runtime.commands.main import main
from rlhf_jax.runtime.sampling.samples import ScoredSampler
from tests import small
from tests.runtime.messages import message


def three_words(prompts, completions, **columns):
    """A reward with ties."""
    return [min(3, len(completion.split())) for completion in completions]


def constant(prompts, completions, **columns):
    return [1.0] * len(prompts)


@pytest.fixture
def config(tmp_path, sft_run):
    config_of_rft = small.rft("-", sft_run[0])
    kept = {name: config_of_rft[name] for name in ("model", "data", "generation")}
    return kept | {
        "rewards": [{"function": f"{__name__}:three_words"}],
        "num_samples": 3,
        "keep_truncated": True,
        "output": str(tmp_path / "pairs.jsonl"),
    }


def test_pairs_are_the_best_and_the_worst_and_are_not_sampled_twice(
    tmp_path, monkeypatch, capsys, config
):
    count = run_pairs(config)
    samples = small.entries(tmp_path / "pairs.samples.jsonl")
    pairs = {each["prompt"]: each for each in small.entries(tmp_path / "pairs.jsonl")}
    assert len(samples) == 12 * 3
    assert count == len(pairs)
    for start in range(0, 36, 3):
        group = [each for each in samples[start : start + 3] if each["completion"].strip()]
        scores = [three_words([], [each["completion"]])[0] for each in group]
        assert scores == [each["score"] for each in group]
        pair = pairs.pop(samples[start]["prompt"], None)
        if not scores or min(scores) == max(scores):
            assert pair is None
            continue
        for side, score in (("chosen", max(scores)), ("rejected", min(scores))):
            assert pair[f"score_{side}"] == score
            assert pair[side] == group[scores.index(score)]["completion"]
    assert not pairs
    assert f"{12 - count} of 12 prompts have no pair" in capsys.readouterr().err
    settings = DataSettings(path=str(tmp_path / "pairs.jsonl"), eval_rows=0)
    assert len(load_examples(settings, "pairs")[0]) == count

    monkeypatch.setattr(ScoredSampler, "__call__", None)  # nothing is left to sample
    written = (tmp_path / "pairs.jsonl").read_bytes()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["pairs", "sample", "--config", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == f"{count} pairs\n"
    assert (tmp_path / "pairs.jsonl").read_bytes() == written


def test_bad_input_is_one_sentence(config):
    def said(**changes):
        return message(run_pairs, config | changes)

    assert said(num_samples=1) == "num_samples must be at least 2, but is 1."
    assert said(rewards=[]).startswith("pairs sample needs a reward: give --model.reward_path")
    assert said(model={}).startswith("pairs sample needs a model: give --model.path")
    assert said(output="pairs.csv") == (
        "output is pairs.csv: give it a name that ends with .jsonl."
    )
    rewards = [{"function": f"{__name__}:constant"}]
    assert said(rewards=rewards).startswith("No pair is left: the responses to each of the 12 pro")
