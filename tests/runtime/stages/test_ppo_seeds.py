"""Several seeds at once: each run is the one that its seed has by itself."""

import json

import jax
import numpy as np
import pytest
from rlhf_jax.runtime.stages.ppo_seeds import SeedsStage
from tests.runtime.test_resume import interrupt_in

from rlhf_jax.errors import InputError
from rlhf_jax.models.huggingface import load_pretrained
from rlhf_jax.runtime import train_ppo
from rlhf_jax.runtime.config import PPOConfig, RLHFConfig, resolve
from rlhf_jax.runtime.run import loop
from tests import small

SEEDS = (5, 6)
EVALUATION = {
    "gold_fn": "rlhf_jax.data.builtin:gold_scores",
    "batch_size": 8,
    "num_samples": 2,
}


def assert_runs_of_seeds(together, alone_of):
    """Each seed of a folder has the metrics and the model of a run with that seed alone."""
    rows = small.rows(together / "metrics.jsonl")
    for seed in SEEDS:
        for expected, row in zip(small.rows(alone_of[seed] / "metrics.jsonl"), rows, strict=True):
            assert expected.pop("step") == row["step"]
            for name, value in expected.items():
                found = row[f"seed_{seed}/{name}"]
                np.testing.assert_allclose(found, value, rtol=1e-4, atol=2e-5, err_msg=name)
        folder = together / f"seed_{seed}" if seed != SEEDS[0] else together
        found, expected = (load_pretrained(x / "hf")[1] for x in (folder, alone_of[seed]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


@pytest.fixture(scope="module")
def train(sft_run, reward_run, tmp_path_factory):
    """Trains into a folder of the given name and returns it."""
    base = tmp_path_factory.mktemp("seeds")

    def train(name, seed=SEEDS[0], count=1, **sections):
        sections = {"evaluation": EVALUATION, "seed": seed, "num_seeds": count, **sections}
        train_ppo(small.ppo(base / name, sft_run[0], reward_run[0], **sections))
        return base / name

    return train


@pytest.fixture(scope="module")
def together(train):
    return train("together", count=2)


@pytest.fixture(scope="module")
def alone(train):
    return {seed: train(f"alone_{seed}", seed) for seed in SEEDS}


def test_each_run_is_that_of_its_seed_alone(together, alone):
    assert_runs_of_seeds(together, alone)
    first, second = (small.rows(alone[seed] / "metrics.jsonl") for seed in SEEDS)
    assert first[-1]["objective/scores"] != second[-1]["objective/scores"]
    samples = [small.rows(run / "samples.jsonl") for run in (together, alone[SEEDS[0]])]
    texts = [[(row["prompt"], row["response"]) for row in rows] for rows in samples]
    assert texts[0] == texts[1]


def test_metrics_are_means_and_the_evaluation_is_of_all_seeds(together, alone):
    for row in small.rows(together / "metrics.jsonl"):
        for name in ("objective/scores", "objective/gold", "loss/value_avg", "val/ratio"):
            values = [row[f"seed_{seed}/{name}"] for seed in SEEDS]
            np.testing.assert_allclose(row[name], np.mean(values), rtol=1e-6)
    found = json.loads((together / "evaluation.json").read_text())
    parts = [json.loads((alone[seed] / "evaluation.json").read_text()) for seed in SEEDS]
    for name in ("scores", "gold", "kl", "win_rate"):
        values = [part["metrics"][name] for part in parts]
        np.testing.assert_allclose(found["metrics"][name], np.mean(values), rtol=1e-3, atol=1e-5)
    (row,) = (row for row in found["table"] if row["metric"].startswith("gold score, "))
    assert "mean of 2 seeds ± " in row["metric"]
    gold = [part["metrics"]["gold"] for part in parts]
    np.testing.assert_allclose(row["after"], np.mean(gold), rtol=1e-4)
    shown = [[sample["after"] for sample in part["samples"]] for part in (found, parts[0])]
    assert shown[0] == shown[1]
    report = (together / "report.html").read_text()
    assert "mean of 2 seeds, ± one standard deviation" in report


def test_a_run_of_seeds_goes_on_as_if_nothing_was(train, together, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in(patch, SeedsStage, "step", 2)
        with pytest.raises(loop.Interrupted, match="after step 2 of 4"):
            train("stopped", count=2)
    small.assert_same_run(together, train("stopped", count=2))


def test_it_is_one_program_that_shares_the_frozen_parts(sft_run, reward_run, tmp_path):
    sections = {"evaluation": EVALUATION, "seed": SEEDS[0], "num_seeds": 2}
    values = small.ppo(tmp_path, sft_run[0], reward_run[0], **sections)
    stage = SeedsStage(resolve(PPOConfig, values))
    state = stage.init_state()
    for index in range(2):
        state, _, _ = stage.step(state, index)
    assert stage._step._cache_size() == 1
    kernel = state.params["model"]["layers"]["attn"]["c_attn"]["kernel"]
    assert kernel.shape == (2, *state.frozen["ref"]["layers"]["attn"]["c_attn"]["kernel"].shape)
    assert state.kl_coef.shape == (2,)


def test_a_reward_in_python_scores_each_seeds_responses(sft_run, tmp_path):
    def train(name, **values):
        config = small.ppo(tmp_path / name, sft_run[0], **values)
        train_ppo(config, reward_fn=small.short_response)
        return tmp_path / name

    together = train("together", num_seeds=2, seed=SEEDS[0])
    assert_runs_of_seeds(together, {seed: train(f"{seed}", seed=seed) for seed in SEEDS})


@pytest.mark.parametrize("kind", [PPOConfig, RLHFConfig])
def test_no_seed_at_all_is_refused(kind):
    with pytest.raises(InputError, match="num_seeds must be at least 1, but is 0"):
        resolve(kind, {"num_seeds": 0})
