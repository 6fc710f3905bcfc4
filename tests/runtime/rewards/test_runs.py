"""Runs of PPO and of all stages with several sources of scores."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax.batches import Sequences
from rlhf_jax.data import train_tokenizer
from rlhf_jax.data.encoding import encode, pad_right
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.huggingface import load_reward_model, save_reward_model
from rlhf_jax.rollout.score import end_scores
from rlhf_jax.runtime import run_evaluate, run_rlhf, train_ppo
from rlhf_jax.runtime.commands import pipeline
from rlhf_jax.runtime.config import PPOConfig, RLHFConfig, resolve
from rlhf_jax.runtime.rewards.scorers import Rewards, find_sources
from rlhf_jax.runtime.stages.online import OnlineStage
from rlhf_jax.runtime.stages.values import value_label
from rlhf_jax.training import ppo
from tests import small
from tests.runtime.messages import message

# --- runs ----------------------------------------------------------------------------------------


def ppo_config(folder, sft_run, *sources, **sections):
    return small.ppo(folder, sft_run[0], rewards=list(sources), **sections)


def stage_of(*arguments, **sections):
    return OnlineStage(resolve(PPOConfig, ppo_config(*arguments, **sections)))


def one_step(stage):
    state, metrics, output = stage.step(stage.init_state(), 0)
    return state, jax.device_get(metrics), output


@pytest.mark.newest
def test_a_step_in_two_programs_equals_the_fused_step(tmp_path, sft_run, reward_run):
    """One reward model alone, or beside a function that has no weight."""
    path = f"{reward_run[0]}/hf"
    function = {"function": "rlhf_jax.data.builtin:gold_scores", "weight": 0.0}
    fused = stage_of(tmp_path, sft_run, {"path": path})
    parts = stage_of(tmp_path, sft_run, {"path": path}, function)
    assert fused.reward_model is not None
    assert parts.reward_model is None
    _, metrics, (rollout, _) = one_step(fused)
    _, metrics_in_parts, (rollout_in_parts, _) = one_step(parts)
    np.testing.assert_array_equal(rollout.tokens, rollout_in_parts.tokens)
    np.testing.assert_allclose(rollout.scores, rollout_in_parts.scores, rtol=1e-5, atol=1e-6)
    assert metrics_in_parts.keys() - metrics.keys() == {
        "objective/rewards/gold_scores",
        f"objective/rewards/{reward_run[0].name}",
    }
    for name, value in metrics.items():
        assert metrics_in_parts[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="module")
def text_scorer(tmp_path_factory, reward_run):
    """The folder of a reward model that has another tokenizer than the policies of the runs.

    It has the architecture of another one, so that the same programs serve both.
    """
    folder = tmp_path_factory.mktemp("text") / "judge" / "hf"
    tokenizer = train_tokenizer(["Quite other words than those of the film reviews."] * 3, 300)
    model, params = load_reward_model(reward_run[0] / "hf")
    assert len(tokenizer) <= model.config.vocab_size
    model = GPT2(dataclasses.replace(model.config, pad_token_id=tokenizer.pad_token_id))
    save_reward_model(folder, model, params, tokenizer)
    return str(folder)


@pytest.mark.newest
def test_the_rewards_of_a_run_judge_it_as_well(tmp_path, monkeypatch, sft_run, text_scorer):
    """A reward model of texts and a function; the references are no part of the judgement."""
    gold = "rlhf_jax.data.builtin:gold_scores"
    stage = stage_of(
        tmp_path,
        sft_run,
        {"path": text_scorer},
        {"function": gold, "weight": 2.0},
        ppo={"subtract_reference_score": True},
        data={"max_response_length": 24},
        evaluation={"gold_fn": gold},
    )
    state, metrics, _ = one_step(stage)
    raw, reference = metrics["objective/raw_scores"], metrics["objective/reference_scores"]
    assert metrics["objective/scores"] == pytest.approx(raw - reference, rel=1e-4)
    parts = [metrics[f"objective/rewards/{name}"] for name in ("judge", "gold_scores")]
    assert raw == pytest.approx(parts[0] + 2.0 * parts[1], rel=1e-4)
    seen, call = [], Rewards.__call__

    def watched(self, *arguments):
        seen.append((arguments, call(self, *arguments)))
        return seen[-1][1]

    monkeypatch.setattr(Rewards, "__call__", watched)
    evaluated = stage.evaluator(
        state.params["model"],
        stage.held_out,
        stage.held_out_examples,
        state.frozen["ref"],
        state.frozen["reward"],
        stage.eval_key,
    )
    [((params, responses, _), (scores, parts))] = seen
    assert params is state.frozen["reward"]
    assert responses.texts == [evaluated.responses]
    np.testing.assert_array_equal(evaluated.scores, scores)
    expected = parts["objective/rewards/judge"] + 2.0 * evaluated.gold
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_scores_by_the_sources(tmp_path, sft_run):
    gold = "rlhf_jax.data.builtin:gold_scores"
    config = {
        "model": {"path": f"{sft_run[0]}/hf"},
        "data": small.ppo("-", "-")["data"],
        "rewards": [{"function": gold, "weight": 2.0}, {"function": gold, "name": "again"}],
        "generation": {"max_new_tokens": 8, "temperature": 0.0},
        "evaluation": {"batch_size": 8, "gold_fn": gold},
        "run_dir": str(tmp_path),
    }
    metrics = run_evaluate(config)["metrics"]
    assert metrics["scores"] == pytest.approx(3.0 * metrics["gold"])


def test_the_score_of_a_reference_is_that_of_its_tokens(tmp_path, sft_run, reward_run):
    """One reward model in two ways: the score taken off, and the pair's own score."""
    path = f"{reward_run[0]}/hf"
    settings = {"ppo": {"subtract_reference_score": True}, "data": {"max_response_length": 24}}
    stage = stage_of(tmp_path, sft_run, {"path": path}, **settings)
    assert stage.reward_model is None
    state, metrics, (rollout, indices) = one_step(stage)
    examples = [stage.examples[index] for index in indices]
    ids = encode(stage.tokenizer, [row["completion"] for row in examples])
    tokens, mask = pad_right([[*row, stage.tokenizer.eos_token_id][:24] for row in ids], 24)
    (params,), model = state.frozen["reward"], stage.rewards.scorers[0].model
    scores = jax.jit(lambda *arrays: end_scores(model, params, Sequences(*arrays)))
    prompts = (rollout.prompts, rollout.prompt_mask)
    expected = np.asarray(scores(*prompts, tokens, mask))
    raw = np.asarray(scores(*prompts, rollout.tokens, rollout.mask))
    np.testing.assert_allclose(rollout.scores, raw - expected, rtol=1e-4, atol=1e-5)
    assert metrics["objective/reference_scores"] == pytest.approx(np.mean(expected), rel=1e-4)
    # A run continues only with the reward model that it began with.
    saved = stage.saved(state)
    assert stage.resumed(state, saved) is not None
    moved = jax.tree.map(lambda x: x, params)
    moved["head"]["kernel"] = moved["head"]["kernel"] + 1e-3
    other = state._replace(frozen={**state.frozen, "reward": (moved,)})
    assert f"or {path} is not the one" in message(stage.resumed, other, saved)


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([{"prompt": "a"}], "has the columns prompt, but subtract_reference_score needs `pr"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
            "Line 2 of {path}: column 'completion' holds nothing: give it a text.",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}],
            "Line 2 of {path}: column 'completion' is an empty text.",
        ),
    ],
)
def test_references_that_are_missing(tmp_path, sft_run, examples, expected):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    config = small.ppo(
        tmp_path / "run",
        sft_run[0],
        data={"path": str(path), "eval_rows": 0},
        ppo={"subtract_reference_score": True},
    )
    assert expected.format(path=path) in message(train_ppo, config, small.short_response)


@pytest.mark.newest
def test_references_may_have_another_name_and_go_to_functions_too(tmp_path, sft_run):
    path = tmp_path / "examples.jsonl"
    prompt = "As long as the prompts of other tests, film"  # so that programs are shared
    examples = [{"prompt": f"{prompt} {i}.", "summary": "x" * i, "kind": "k"} for i in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    calls = []

    def judge(prompts, completions, **columns):
        calls.append((completions, columns))
        return [len(text) for text in completions]

    config = small.ppo(
        tmp_path / "run",
        sft_run[0],
        data={"path": str(path), "columns": {"completion": "summary"}, "eval_rows": 0},
        ppo={"subtract_reference_score": True},
        logging={"eval_every": 0},
    )
    train_ppo({**config, "data": {**config["data"], "max_response_length": 24}}, judge)
    texts, columns = calls[1]
    assert texts == columns["completion"]
    assert set(columns) == {"completion", "kind"}
    assert len(calls) == 1 + small.STEPS  # the references are known from the first step on


def test_a_fused_step_refuses_references():
    model = GPT2(GPT2Config(10, 8, n_embd=8, n_layer=1, n_head=1))
    settings = ppo.Settings(subtract_reference_score=True)
    assert message(lambda: ppo.make_step(model, settings)).startswith(
        "ppo.subtract_reference_score needs the reference responses, which a full step does not"
    )


# --- all stages in a row -------------------------------------------------------------------------


def stages(tmp_path, **values):
    """Whether a reward model is trained, and the paths and functions of PPO's rewards."""
    config = resolve(RLHFConfig, small.rlhf(tmp_path, **values))
    third = pipeline.stage_configs(config)[-1]
    sources = find_sources(third.model.reward_path, third.rewards)
    return pipeline.trains_reward_model(config), [each.source.path for each in sources]


def test_when_run_rlhf_trains_a_reward_model(tmp_path):
    trained, function = f"{tmp_path}/reward/hf", {"function": "tests.small:short_response"}
    assert stages(tmp_path) == (True, [trained])
    assert stages(tmp_path, rewards=[function]) == (False, [None])
    assert stages(tmp_path, rewards=[{"weight": 2.0}, function]) == (True, [trained, None])
    model = {**small.MODEL, "reward_path": "mine"}
    assert stages(tmp_path, rewards=[function], model=model) == (False, ["mine", None])


def test_sources_are_looked_at_before_the_first_stage(tmp_path):
    wrong = [{"function": "no_such:f"}]
    assert message(run_rlhf, small.rlhf(tmp_path, rewards=wrong)).startswith("'no_such:f' names no")
    wrong = [{"path": "./no/such"}]
    assert message(run_rlhf, small.rlhf(tmp_path, rewards=wrong)).startswith(
        "There is no folder ./"
    )


def test_all_functions_are_tried_with_the_columns_before_the_first_step(tmp_path, sft_run):
    def narrow(prompts, completions):
        return [0.0 for _ in completions]

    (tmp_path / "examples.jsonl").write_text('{"prompt": "a b", "label": 1}\n' * 16)
    data = {"path": str(tmp_path / "examples.jsonl")}
    error = message(train_ppo, small.ppo(tmp_path / "run", sft_run[0], data=data), narrow)
    assert error.startswith("narrow cannot be called as narrow(prompts, completions, **columns)")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"rewards": [{}]}, "rewards: each element has at least one key, such as {path: folder}"),
        ({"ppo": {"ptx_coef": 1.0}, "data": {"path": "x.jsonl"}}, "there are no texts to mix in"),
    ],
)
def test_what_cannot_be_configured(tmp_path, sections, expected):
    assert expected in message(train_ppo, small.ppo(tmp_path, tmp_path, **sections))


def test_values_cannot_start_from_a_model_with_another_tokenizer(
    tmp_path, sft_run, reward_run, text_scorer
):
    sections = {"ppo": {"value_model": "reward"}, "model": {"value_path": text_scorer}}
    config = small.ppo(tmp_path, sft_run[0], reward_run[0], **sections)
    config["model"] |= {"path": f"{sft_run[0]}/hf", "reward_path": f"{reward_run[0]}/hf"}
    assert "which the values are to start from, has another tokenizer" in message(train_ppo, config)


def test_the_values_of_a_classifier_are_those_of_its_label():
    def label(model, sources):
        values = {"model": model, "rewards": sources, "ppo": {"value_model": "reward"}}
        return value_label(resolve(PPOConfig, values))

    assert label({"reward_path": "a"}, [{"label": 1}]) == 1
    assert label({"reward_path": "a", "value_path": "b"}, [{"label": 1}]) is None
    assert label({"value_path": "b"}, [{"path": "b", "label": 2}]) == 2


def test_models_of_values_and_scores_are_checked_before_the_first_stage(tmp_path):
    nowhere = {"model": {"value_path": str(tmp_path / "no")}, "ppo": {"value_model": "reward"}}
    posts = tmp_path / "posts.jsonl"
    posts.write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    sizes = {"max_prompt_length": 16, "max_response_length": 60, "eval_rows": 0}
    long = {
        "ppo": {"subtract_reference_score": True},
        "data": {**small.rlhf("-")["data"], "ppo": {"path": str(posts), **sizes}},
    }
    equal = tmp_path / "equal.jsonl"
    equal.write_text('{"chosen": "same", "rejected": "same"}\n' * 4)
    for sections, expected in (
        (nowhere, "There is no folder"),
        (
            long,
            "data.max_prompt_length + data.max_response_length, to be scored by the reward model",
        ),
        ({"data": {"reward": {"path": str(equal), "eval_rows": 0}}}, "No pair is left of the 4 in"),
    ):
        assert expected in message(run_rlhf, small.rlhf(tmp_path / "run", **sections))
        assert not (tmp_path / "run" / "sft" / "metrics.jsonl").exists()
