"""A run whose reward model is normalized before and after its training."""

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax.models.huggingface import load_reward_model
from rlhf_jax.runtime import train_reward
from rlhf_jax.runtime.config import RewardConfig, resolve
from rlhf_jax.runtime.evaluation.normalization import Normalizer
from rlhf_jax.runtime.evaluation.policies import read_evaluation
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.stages.offline import RewardModelStage
from rlhf_jax.training.reward import make_score_step
from tests import small

NORMALIZED = {"normalize_before": True, "normalize_after": True, "normalize_rows": 12}


def config(folder, sft_run, **changes):
    return small.reward(folder, sft_run[0], reward={**NORMALIZED, **changes})


@pytest.fixture(scope="module")
def full(tmp_path_factory, sft_run):
    folder = tmp_path_factory.mktemp("normalized")
    train_reward(config(folder, sft_run))
    return folder


@pytest.fixture(scope="module")
def stage(tmp_path_factory, sft_run):
    folder = tmp_path_factory.mktemp("stage")
    return RewardModelStage(resolve(RewardConfig, config(folder, sft_run)))


def scores_of_first_pairs(stage, params):
    """Of both responses of the pairs that the run trains on first: a batch and a half of them."""
    indices = np.concatenate([stage.batches.indices(step) for step in (0, 1)])[:12]
    examples = jax.tree.map(lambda array: array[indices], stage.batches.examples)
    return np.asarray(jax.jit(make_score_step(stage.model))(params, examples), np.float64)


@pytest.mark.newest
def test_the_exported_model_is_normalized_on_the_first_training_examples(full, stage):
    model, params = load_reward_model(full / "hf")
    written = scores_of_first_pairs(stage, params)
    assert written[:, 0].mean() == pytest.approx(0.0, abs=1e-5)
    assert written[:, 0].std() == pytest.approx(1.0, abs=1e-5)
    trained = scores_of_first_pairs(stage, small.checkpoint(full)["params"])
    assert abs(trained[:, 0].mean()) > 1e-3
    expected = (trained - trained[:, 0].mean()) / trained[:, 0].std()
    np.testing.assert_allclose(written, expected, atol=1e-4)


def test_training_starts_from_a_normalized_model(stage):
    """The same seed gives the same fresh head, which is then scaled."""
    state = stage.init_state()
    scores = scores_of_first_pairs(stage, state.params)
    assert scores[:, 0].mean() == pytest.approx(0.0, abs=1e-5)
    assert scores[:, 0].std() == pytest.approx(1.0, abs=1e-5)


def held_out_scores(stage, params):
    return np.asarray(jax.jit(make_score_step(stage.model))(params, stage.held_out), np.float64)


def margin_of(scores):
    return (scores[:, 0] - scores[:, 1]).mean()


def test_the_evaluation_at_the_end_is_of_the_exported_model(full, stage):
    exported = held_out_scores(stage, load_reward_model(full / "hf")[1])
    trained = held_out_scores(stage, small.checkpoint(full)["params"])
    evaluation = read_evaluation(str(full))["metrics"]
    assert evaluation["margin"] == pytest.approx(margin_of(exported), rel=1e-4)
    # The deviation was about 1 before, from the normalization at the start, and not by 1e-4.
    assert abs(margin_of(trained) / margin_of(exported) - 1) > 1e-3


def test_metrics_and_samples_of_all_steps_are_of_the_model_in_training(full, stage):
    """So that the best step is found on one scale."""
    scores = held_out_scores(stage, small.checkpoint(full)["params"])
    last = small.entries(full / "metrics.jsonl")[-1]
    assert last["eval/margin"] == pytest.approx(margin_of(scores), rel=1e-4)
    samples = [
        each for each in small.entries(full / "samples.jsonl") if each["step"] == small.STEPS
    ]
    logged = [entry["score"] for entry in samples]
    np.testing.assert_allclose(logged, scores[:2].ravel(), rtol=1e-4, atol=1e-5)


def test_the_scores_for_the_normalization_are_computed_once(tmp_path, monkeypatch, sft_run):
    calls, normalize = [], Normalizer.__call__
    monkeypatch.setattr(Normalizer, "__call__", lambda *args: calls.append(1) or normalize(*args))
    train_reward(config(tmp_path, sft_run, normalize_before=False))
    assert len(calls) == 1


@pytest.mark.newest
def test_a_run_that_goes_on_is_normalized_once(tmp_path, monkeypatch, sft_run, full):
    with monkeypatch.context() as patch:
        small.interrupt_in(patch, RewardModelStage, "step", 2)
        with pytest.raises(loop.Interrupted, match="after step 2 of 4"):
            train_reward(config(tmp_path, sft_run))
    train_reward(config(tmp_path, sft_run))
    small.assert_same_run(full, tmp_path)
    # Once more from the last checkpoint: nothing is left but to write the model.
    epath.Path(tmp_path / "hf").rmtree()
    train_reward(config(tmp_path, sft_run))
    small.assert_same_run(full, tmp_path)
