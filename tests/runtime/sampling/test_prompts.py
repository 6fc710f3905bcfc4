"""`rlhf filter`: prompts whose pass rate lies in a range."""

import json

import pytest

from rlhf_jax.data import load_examples
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.runtime import run_filter
from rlhf_jax.runtime.commands.main import main
from tests import small
from tests.runtime.messages import message
from tests.runtime.sampling.test_pairs import three_words


@pytest.fixture
def config(tmp_path, sft_run):
    config_of_rft = small.rft("-", sft_run[0])
    kept = {name: config_of_rft[name] for name in ("model", "data", "generation")}
    return kept | {
        "rewards": [{"function": "tests.runtime.sampling.test_pairs:three_words"}],
        "num_samples": 3,
        "pass_threshold": 2.0,
        "min_pass_rate": 0.3,
        "max_pass_rate": 0.7,
        "output": str(tmp_path / "prompts.jsonl"),
    }


def test_prompts_solved_in_part_are_kept_with_their_rate(tmp_path, config, capsys):
    count = run_filter(config)
    samples = small.entries(tmp_path / "prompts.samples.jsonl")
    expected = {}
    for start in range(0, 36, 3):
        texts = [each["completion"] for each in samples[start : start + 3]]
        rate = sum(score >= 2 for score in three_words([], texts)) / 3
        if 0.3 <= rate <= 0.7:
            expected[samples[start]["prompt"]] = rate
    kept = small.entries(config["output"])
    assert {each["prompt"]: each["pass_rate"] for each in kept} == expected
    assert count == len(kept)
    assert f"{count} of 12 prompts have a pass rate from 0.3 to 0.7" in capsys.readouterr().err
    settings = DataSettings(path=config["output"], eval_rows=0)
    assert len(load_examples(settings, "prompts")[0]) == count
    # The responses are there already: another range samples none, and may leave no prompt.
    nothing = message(run_filter, config | {"pass_threshold": 9.0})
    assert nothing.startswith("No prompt is left: the pass rates of the 12 prompts are from 0.00")


def test_bad_ranges_are_one_sentence(config, tmp_path, capsys):
    wrong = config | {"min_pass_rate": 0.9}
    assert message(run_filter, wrong).startswith("min_pass_rate = 0.9 is above max_pass_rate = 0.7")
    (tmp_path / "a.yaml").write_text(json.dumps(config | {"num_samples": 0}))
    assert main(["filter", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "num_samples must be above 0, but is 0." in capsys.readouterr().err
