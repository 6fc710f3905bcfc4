"""Where scores come from: models of tokens, models of texts, functions, and sums of several."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data import builtin, train_tokenizer
from rlhf_jax.data.datasets import Settings as DataSettings
from rlhf_jax.data.encoding import encode, pad_left, pad_right
from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.huggingface import load_reward_model, save_reward_model
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime import run_evaluate, run_rlhf, train_ppo
from rlhf_jax.runtime.commands import pipeline
from rlhf_jax.runtime.config import PPOConfig, RLHFConfig, parse, resolve, to_yaml
from rlhf_jax.runtime.rewards import scorers as rewards
from rlhf_jax.runtime.rewards.scorers import FunctionScores, ModelScores, Responses, Rewards
from rlhf_jax.runtime.rewards.sources import RewardSource
from rlhf_jax.runtime.stages.ppo import PPOStage, value_label
from rlhf_jax.training import ppo
from tests import small

PROMPTS = ["The film was", "I", "Quite another XYZ; than the tokenizer knows"]
ANSWERS = [" good.", " saw it in the end and slept", " bad"]
REFERENCES = [" fine.", " liked it", " a film"]
ENDED = [True, False, True]


def message(function, *arguments):
    """The sentence that a call fails with, one line."""
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def tiny_scorer(tokenizer, n_positions):
    """(model, parameters) of a reward model for a tokenizer."""
    config = GPT2Config(len(tokenizer), n_positions, n_embd=8, n_layer=1, n_head=2)
    model = GPT2(dataclasses.replace(config, pad_token_id=tokenizer.pad_token_id))
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    trunk = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return model, {"model": trunk, "head": {"kernel": np.arange(8, dtype=np.float32)}}


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """One token for each byte: the policy's."""
    return train_tokenizer(["none"], 258)


@pytest.fixture(scope="module")
def other_tokenizer():
    """Some merges: its ids are others."""
    return train_tokenizer([*PROMPTS[:2], *ANSWERS] * 3, 280)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bytes_tokenizer, other_tokenizer):
    """Reward models with the policy's tokenizer and with another one."""
    folder = tmp_path_factory.mktemp("scorers")
    for name, tokenizer, most in (("same", bytes_tokenizer, 64), ("other", other_tokenizer, 16)):
        save_reward_model(folder / name / "hf", *tiny_scorer(tokenizer, most), tokenizer)
    return folder


def responses_of(tokenizer, texts=(ANSWERS,), ended=(ENDED,), prompts=PROMPTS):
    """Prompts and one or more answers to each as tokens of a tokenizer."""
    candidates = []
    for answers, ends in zip(texts, ended, strict=True):
        ids = encode(tokenizer, answers)
        eos = tokenizer.eos_token_id
        rows = [[*row, eos] if end else row for row, end in zip(ids, ends, strict=True)]
        candidates.append(pad_right(rows, max(map(len, rows)) + 2))
    rows = [row or [tokenizer.bos_token_id] for row in encode(tokenizer, prompts)]
    padded = pad_left(rows, max(map(len, rows)) + 3)
    columns = {"answer": list(range(len(prompts)))}
    return Responses(tokenizer, *padded, candidates, columns, np.arange(len(prompts)) + 5)


def load(tokenizer, *sources, reward_path=None, reward_fn=None):
    found = rewards.find_sources(reward_path, [RewardSource(**each) for each in sources], reward_fn)
    return rewards.load_rewards(found, ModelSettings(), tokenizer)


def by_hand(folder, tokenizer, texts=(ANSWERS,), ended=(ENDED,)):
    """Scores [N] of each list of texts: prompt and response as one row, padded on the right."""
    model, params = load_reward_model(folder / "hf")
    most = model.config.n_positions
    responses = [
        [row + [tokenizer.eos_token_id] * end for row, end in zip(encode(tokenizer, answers), ends)]
        for answers, ends in zip(texts, ended)
    ]
    scores = []
    hidden = jax.jit(model.hidden)
    for column in responses:
        rooms = [most - max(map(len, row)) for row in zip(*responses)]
        prompts = [row[-room:] for row, room in zip(encode(tokenizer, PROMPTS), rooms)]
        rows = [prompt + response for prompt, response in zip(prompts, column)]
        states = np.asarray(hidden(params["model"], *pad_right(rows, most)))
        last = np.stack([states[i, len(row) - 1] for i, row in enumerate(rows)])
        scores.append(last @ np.asarray(params["head"]["kernel"]))
    return scores


# --- reward models -------------------------------------------------------------------------------


def test_texts_that_round_trip_score_as_their_tokens_do(bytes_tokenizer):
    """One reward model two ways; a prompt without text is a single token."""
    model, params = tiny_scorer(bytes_tokenizer, 64)
    prompts = [*PROMPTS[:2], ""]
    responses = responses_of(bytes_tokenizer, (ANSWERS, REFERENCES), (ENDED, [True] * 3), prompts)
    by_tokens = ModelScores(model)(params, responses, 3)
    by_texts = ModelScores(model, bytes_tokenizer)(params, responses, 2)
    assert by_tokens.shape == (3, 2)
    assert np.ptp(by_tokens) > 0.1
    np.testing.assert_allclose(by_texts, by_tokens, rtol=1e-5, atol=1e-6)


def test_a_reward_model_with_another_tokenizer_scores_texts(
    folders, bytes_tokenizer, other_tokenizer, caplog
):
    """Also where the prompt must lose its left end, and in batches that have to be filled up."""
    scorer, params = load(bytes_tokenizer, {"path": f"{folders}/other/hf"})
    assert scorer.single is None
    texts, ended = (ANSWERS, REFERENCES), (ENDED, [True] * 3)
    responses = responses_of(bytes_tokenizer, texts, ended)
    given, parts = scorer(params, responses, 2)
    expected = by_hand(folders / "other", other_tokenizer, texts, ended)
    np.testing.assert_allclose(parts["objective/raw_scores"], expected[0], rtol=1e-4)
    np.testing.assert_allclose(parts["objective/reference_scores"], expected[1], rtol=1e-4)
    np.testing.assert_allclose(given, np.subtract(*expected), rtol=1e-4, atol=1e-5)
    scorer(params, responses, 2)
    told = [record.getMessage() for record in caplog.records if record.name == "rlhf_jax.data"]
    # Not at every step.
    assert told == ["1 of 3 prompts or responses were cut to the reward model's 16 positions."]


def test_texts_are_cut_to_the_positions_and_something_is_left(other_tokenizer):
    long = "a film " * 40
    prompts, (first, second), cut = rewards.retokenize(
        other_tokenizer, 16, [long, "", "I"], [[long, "", "I"], ["I", "I", ""]], [[1, 1, 0]] * 2
    )
    eos = other_tokenizer.eos_token_id
    assert [len(prompts[0]), len(first[0])] == [1, 15]
    assert prompts[1] == [other_tokenizer.bos_token_id]
    assert (first[1], first[2], second[0][-1], second[2]) == (
        [eos],
        other_tokenizer("I")["input_ids"],
        eos,
        [eos],
    )
    assert cut == 1


def test_few_widths_of_texts_are_compiled(bytes_tokenizer):
    model, params = tiny_scorer(bytes_tokenizer, 64)
    scorer = ModelScores(model, bytes_tokenizer)
    for length in range(1, 9):
        texts = [["x" * length] * 3]
        scorer(params, responses_of(bytes_tokenizer, texts, prompts=PROMPTS[:2] + ["I"]), 3)
    assert scorer._score._cache_size() == 2  # of 8 and, with EOS, of 16 tokens


def test_which_tokenizers_are_the_same(bytes_tokenizer, other_tokenizer):
    padded = train_tokenizer(["none"], 258)
    padded.add_special_tokens({"pad_token": "<|another|>"})
    assert assemble.shares_tokens(bytes_tokenizer, padded)
    assert not assemble.shares_tokens(padded, bytes_tokenizer)
    assert not assemble.shares_tokens(bytes_tokenizer, other_tokenizer)
    from tokenizers import Tokenizer

    merged = json.loads(other_tokenizer.backend_tokenizer.to_str())
    merged["model"]["merges"] = merged["model"]["merges"][::-1]
    reversed_ = type(other_tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(merged)))
    assert reversed_.get_vocab() == other_tokenizer.get_vocab()
    assert not assemble.shares_tokens(other_tokenizer, reversed_)


# --- sums ----------------------------------------------------------------------------------------


def lengths(prompts, completions, **columns):
    return [len(text) for text in completions]


def test_a_weighted_sum_with_the_mean_of_each_source(folders, bytes_tokenizer, other_tokenizer):
    responses = responses_of(bytes_tokenizer)
    scorer, params = load(
        bytes_tokenizer,
        {"path": f"{folders}/same/hf", "weight": 2.0},
        {"path": f"{folders}/other/hf", "weight": -0.5, "name": "judge"},
        {"function": "rlhf_jax.data.builtin:gold_scores", "weight": 0.0},
        reward_fn=lengths,
    )
    given, parts = scorer(params, responses, 3)
    (same,) = by_hand(folders / "same", bytes_tokenizer)
    (other,) = by_hand(folders / "other", other_tokenizer)
    gold, length = builtin.gold_scores(PROMPTS, ANSWERS), lengths(PROMPTS, ANSWERS)
    expected = 2.0 * same - 0.5 * other + length
    np.testing.assert_allclose(given, expected, rtol=1e-4)
    values = {"same": same, "judge": other, "gold_scores": gold, "lengths": length}
    assert parts.keys() == {f"objective/rewards/{name}" for name in values}
    for name, value in values.items():
        np.testing.assert_allclose(parts[f"objective/rewards/{name}"], value, rtol=1e-4)


def test_a_function_scores_each_reference_once(bytes_tokenizer):
    seen = []

    def judge(prompts, completions, *, answer):
        seen.append((prompts, completions, answer))
        return lengths(prompts, completions)

    scorer = Rewards(["judge"], [3.0], [FunctionScores(judge)])
    responses = responses_of(bytes_tokenizer, (ANSWERS, REFERENCES), (ENDED, [True] * 3))
    given, parts = scorer((), responses, 3)
    difference = np.subtract(lengths(PROMPTS, ANSWERS), lengths(PROMPTS, REFERENCES))
    np.testing.assert_array_equal(given, 3.0 * difference)
    assert parts.keys() == {"objective/raw_scores", "objective/reference_scores"}
    raw = 3.0 * np.asarray(lengths(PROMPTS, ANSWERS))
    np.testing.assert_array_equal(parts["objective/raw_scores"], raw)
    assert seen == [(PROMPTS, ANSWERS, [0, 1, 2]), (PROMPTS, REFERENCES, [0, 1, 2])]
    responses.indices[0] = 99  # another row, of which nothing is known
    scorer((), responses, 3)
    assert seen[2:] == [(PROMPTS, ANSWERS, [0, 1, 2]), (PROMPTS[:1], REFERENCES[:1], [0])]


def test_one_reward_model_of_weight_one_and_the_same_tokenizer_is_single(folders, bytes_tokenizer):
    same = {"path": f"{folders}/same/hf"}
    assert load(bytes_tokenizer, same)[0].single is not None
    assert load(bytes_tokenizer, reward_path=same["path"])[0].single is not None
    assert load(bytes_tokenizer, {**same, "weight": 2.0})[0].single is None
    assert load(bytes_tokenizer, same, {**same, "name": "again"})[0].single is None
    assert load(bytes_tokenizer, reward_fn=lengths)[0].single is None


# --- sources -------------------------------------------------------------------------------------


def names_of(reward_path, *sources, reward_fn=None):
    found = rewards.find_sources(reward_path, [RewardSource(**each) for each in sources], reward_fn)
    return [(each.name, each.source.path, each.source.weight) for each in found]


def test_what_the_sources_are_and_how_they_are_called():
    function = {"function": "rlhf_jax.data.builtin:gold_scores"}
    assert names_of(None) == []
    assert names_of("runs/reward/hf") == [("reward", "runs/reward/hf", 1.0)]
    assert names_of("gpt2", {"path": "a/b c"}) == [("gpt2", "gpt2", 1.0), ("b_c", "a/b c", 1.0)]
    # A source without path and function stands for model.reward_path.
    assert names_of("x/hf", function, {"weight": 0.5}) == [
        ("gold_scores", None, 1.0),
        ("x", "x/hf", 0.5),
    ]
    # A function that is passed on takes the place of model.reward_path, not of `rewards`.
    assert names_of("x/hf", reward_fn=lengths) == [("lengths", None, 1.0)]
    assert [name for name, *_ in names_of("x/hf", {}, reward_fn=lambda *_: [])] == ["x", "lambda"]


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([{}], "rewards: a source without path and function is the reward model of model.reward"),
        ([{"path": "a/x"}, {"path": "b/x/hf"}], "rewards: two sources are called 'x'; give one"),
        ([{"path": "a", "function": "b:c"}], "rewards: a source is a path or a function, but one"),
        ([{"path": "a", "weight": float("nan")}], "rewards: weight must be a finite number, but"),
        ([{"path": "a", "name": "a/b"}], "rewards: name must be letters, digits, points, hyphens"),
        ([{"path": "a", "label": -1}], "rewards: label must be 0 or more, and belongs to a rewar"),
        ([{"function": "a:b", "label": 0}], "rewards: label must be 0 or more, and belongs to a"),
        ([{"function": "no_such:f"}], "'no_such:f' names no function (No module named"),
        ([{"function": "sys:path"}], "'sys:path' is not a function; write it as module:function."),
    ],
)
def test_sources_that_cannot_be(sources, said):
    assert message(lambda: names_of(None, *sources)).startswith(said)


def test_sources_in_a_file_and_on_the_command_line(tmp_path):
    text = "rewards:\n- {path: runs/reward/hf, weight: 2, name: judge}\n- {function: 'a:b'}\n"
    (tmp_path / "config.yaml").write_text(text)
    flag = "[{path: runs/reward/hf, weight: 2, name: judge}, {function: 'a:b'}]"
    expected = (
        RewardSource(path="runs/reward/hf", weight=2.0, name="judge"),
        RewardSource(function="a:b"),
    )
    config = resolve(PPOConfig, tmp_path / "config.yaml")
    assert config.rewards == expected == parse(PPOConfig, ["--rewards", flag]).rewards
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert resolve(PPOConfig, tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"pth": "a"}], "Unknown key 'pth' (did you mean path?) in rewards; each has path, func"),
        ([{"path": "a", "weight": "x"}], "rewards: weight must be float, but is 'x'."),
        ({"path": "a"}, "rewards must be a list such as [{function: module:function}], but is "),
        ([{"path": "a", "function": "b:c"}], "rewards: a source is a path or a function, but"),
    ],
)
def test_wrong_sources_are_named_in_one_sentence(value, said):
    assert message(resolve, PPOConfig, {"rewards": value}).startswith(said)


# --- functions -----------------------------------------------------------------------------------


def giving(given):
    def judge(prompts, completions, **columns):
        return given

    return judge


@pytest.mark.parametrize(
    "given", [[1, 0.5], (True, False), np.ones(2), jax.numpy.ones(2), iter([1.0, 2.0])]
)
def test_numbers_of_any_kind_are_scores(given):
    scores = assemble.call_scores(giving(given), ["p"] * 2, ["a", "b"], {})
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "judge gave None; it has to give a list of numbers, one for each completion."),
        (0.5, "judge gave 0.5; it has to give a list of numbers, one for each completion."),
        ("12", "judge gave 12; it has to give a list of numbers, one for each completion."),
        ({}, "judge gave {}; it has to give a list of numbers, one for each completion."),
        ([1.0], "judge gave 1 scores for 2 completions; it has to give one for each."),
        ([1.0, "2.0"], "judge gave '2.0' at index 1; it has to give a number for each completion."),
        ([None, 1.0], "judge gave None at index 0; it has to give a number for each completion."),
        ([1.0, [2.0]], "judge gave [2.0] at index 1; it has to give a number for each completion."),
        (
            [1.0, float("nan")],
            "judge gave the score nan for the completion 'b' at index 1; it has to give a finite "
            "number.",
        ),
    ],
)
def test_what_is_no_list_of_numbers(given, said):
    assert message(assemble.call_scores, giving(given), ["p"] * 2, ["a", "b"], {}) == said


# --- runs ----------------------------------------------------------------------------------------


def ppo_config(folder, sft_run, *sources, **sections):
    return small.ppo(folder, sft_run[0], rewards=list(sources), **sections)


def stage_of(*arguments, **sections):
    return PPOStage(resolve(PPOConfig, ppo_config(*arguments, **sections)))


def one_step(stage):
    state, metrics, output = stage.step(stage.init_state(), 0)
    return state, jax.device_get(metrics), output


def test_the_parts_of_a_step_do_what_the_whole_step_does(tmp_path, sft_run, reward_run):
    """One reward model alone, or beside a function that has no weight."""
    path = f"{reward_run[0]}/hf"
    function = {"function": "rlhf_jax.data.builtin:gold_scores", "weight": 0.0}
    whole = stage_of(tmp_path, sft_run, {"path": path})
    parts = stage_of(tmp_path, sft_run, {"path": path}, function)
    assert whole.reward_model is not None
    assert parts.reward_model is None
    _, metrics, (rollout, _) = one_step(whole)
    _, map_microbatches, (rollout_in_parts, _) = one_step(parts)
    np.testing.assert_array_equal(rollout.tokens, rollout_in_parts.tokens)
    np.testing.assert_allclose(rollout.scores, rollout_in_parts.scores, rtol=1e-5, atol=1e-6)
    assert map_microbatches.keys() - metrics.keys() == {
        "objective/rewards/gold_scores",
        f"objective/rewards/{reward_run[0].name}",
    }
    for name, value in metrics.items():
        assert map_microbatches[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.fixture(scope="module")
def text_scorer(tmp_path_factory, reward_run):
    """The folder of a reward model that has another tokenizer than the policies of the runs.

    It is of the form of another one, so that the same programs serve both.
    """
    folder = tmp_path_factory.mktemp("text") / "judge" / "hf"
    tokenizer = train_tokenizer(["Quite other words than those of the film reviews."] * 3, 300)
    model, params = load_reward_model(reward_run[0] / "hf")
    assert len(tokenizer) <= model.config.vocab_size
    model = GPT2(dataclasses.replace(model.config, pad_token_id=tokenizer.pad_token_id))
    save_reward_model(folder, model, params, tokenizer)
    return str(folder)


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
    judged = stage.judge(
        state.params["model"],
        stage.held_out,
        stage.held_out_rows,
        state.frozen["ref"],
        state.frozen["reward"],
        stage.eval_key,
    )
    [((params, responses, _), (scores, parts))] = seen
    assert params is state.frozen["reward"]
    assert responses.texts == [judged.responses]
    np.testing.assert_array_equal(judged.scores, scores)
    expected = parts["objective/rewards/judge"] + 2.0 * judged.gold
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
    rows = [stage.rows[index] for index in indices]
    ids = encode(stage.tokenizer, [row["completion"] for row in rows])
    tokens, mask = pad_right([[*row, stage.tokenizer.eos_token_id][:24] for row in ids], 24)
    batch = PromptBatch(rollout.prompts, rollout.prompt_mask, indices)
    (params,), model = state.frozen["reward"], stage.rewards.scorers[0].model
    scores = jax.jit(lambda rollout: ppo.response_scores(model, params, batch, rollout))
    expected = np.asarray(scores(rollout._replace(tokens=tokens, mask=mask)))
    raw = np.asarray(scores(rollout))
    np.testing.assert_allclose(rollout.scores, raw - expected, rtol=1e-4, atol=1e-5)
    assert metrics["objective/reference_scores"] == pytest.approx(np.mean(expected), rel=1e-4)
    # What the run began with is told apart from what it is continued with.
    saved = stage.saved(state)
    assert stage.resumed(state, saved) is not None
    moved = jax.tree.map(lambda x: x, params)
    moved["head"]["kernel"] = moved["head"]["kernel"] + 1e-3
    other = state._replace(frozen={**state.frozen, "reward": (moved,)})
    assert f"or {path} is not the one" in message(stage.resumed, other, saved)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a"}], "has the columns prompt, but ppo.subtract_reference_score needs `pr"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
            "Row 2 of {path}: column 'completion' holds nothing: give it a text.",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}],
            "Row 2 of {path}: column 'completion' is an empty text.",
        ),
    ],
)
def test_references_that_are_missing(tmp_path, sft_run, rows, said):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small.ppo(
        tmp_path / "run",
        sft_run[0],
        data={"path": str(path), "eval_rows": 0},
        ppo={"subtract_reference_score": True},
    )
    assert said.format(path=path) in message(train_ppo, config, small.short_response)


def test_references_may_be_messages_and_end_once():
    tokenizer = train_tokenizer(["none"], 258)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "You"}]
    rows = [{"prompt": turns[0], "completion": turns[1]}, {"prompt": "a", "completion": "bcdef"}]
    settings = DataSettings(max_response_length=5)
    tokens, mask = rewards.reference_tokens(rows, tokenizer, settings)
    eos = tokenizer.eos_token_id
    assert tokens[0][mask[0]].tolist() == [*tokenizer("You")["input_ids"], eos]
    assert tokens[1][mask[1]].tolist() == tokenizer("bcdef")["input_ids"]  # EOS was cut


def test_references_may_have_another_name_and_go_to_functions_too(tmp_path, sft_run):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Film {i}.", "summary": "x" * i, "kind": "k"} for i in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = []

    def judge(prompts, completions, **columns):
        given.append((completions, columns))
        return lengths(prompts, completions)

    config = small.ppo(
        tmp_path / "run",
        sft_run[0],
        data={"path": str(path), "columns": {"completion": "summary"}, "eval_rows": 0},
        ppo={"subtract_reference_score": True},
        logging={"eval_every": 0},
    )
    train_ppo({**config, "data": {**config["data"], "max_response_length": 24}}, judge)
    texts, columns = given[1]
    assert texts == columns["completion"]
    assert set(columns) == {"completion", "kind"}
    assert len(given) == 1 + small.STEPS  # the references are known from the first step on


def test_a_whole_step_cannot_know_the_references():
    model = GPT2(GPT2Config(10, 8, n_embd=8, n_layer=1, n_head=1))
    settings = ppo.Settings(subtract_reference_score=True)
    assert message(lambda: ppo.make_step(model, settings)).startswith(
        "ppo.subtract_reference_score needs the reference responses, which a whole step does not"
    )


# --- all stages in a row -------------------------------------------------------------------------


def stages(tmp_path, **values):
    """Whether a reward model is trained, and the paths and functions of PPO's rewards."""
    config = resolve(RLHFConfig, small.rlhf(tmp_path, **values))
    third = pipeline.ppo_config(config)
    found = rewards.find_sources(third.model.reward_path, third.rewards)
    return pipeline.trains_reward_model(config), [each.source.path for each in found]


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


@pytest.mark.parametrize(
    ("function", "columns", "said"),
    [
        (lambda prompts, completions: [], ["label"], "got an unexpected keyword argument 'label'"),
        (lambda prompts, completions, **columns: [], ["prompts"], "multiple values for argument"),
        (lambda prompts: [], [], "too many positional arguments"),
    ],
)
def test_a_function_that_cannot_be_called_with_the_data_is_refused(function, columns, said):
    told = message(assemble.check_call, function, columns)
    assert said in told
    assert told.endswith("let it take **columns, and call no column prompts or completions.")
    assemble.check_call(lambda p, c, **columns: [], ["label", "completion"])
    assemble.check_call(max, ["label"])  # nothing is known of it


def test_all_functions_are_tried_with_the_columns_before_the_first_step(tmp_path, sft_run):
    def narrow(prompts, completions):
        return [0.0 for _ in completions]

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a b", "label": 1}\n' * 16)
    data = {"path": str(tmp_path / "rows.jsonl")}
    told = message(train_ppo, small.ppo(tmp_path / "run", sft_run[0], data=data), narrow)
    assert told.startswith("narrow cannot be called as narrow(prompts, completions, **columns)")


def test_scores_beyond_float32_are_refused(bytes_tokenizer):
    def huge(prompts, completions, **columns):
        return [1e39 for _ in completions]

    scorer = Rewards(["huge"], [1.0], [FunctionScores(huge)])
    told = message(scorer, (), responses_of(bytes_tokenizer), 3)
    assert told.startswith("The scores of huge come to inf")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rewards": [{}]}, "rewards: a source has at least one key; {weight: 1.0} stands for"),
        ({"ppo": {"ptx_coef": 1.0}, "data": {"path": "x.jsonl"}}, "there are no texts to mix in"),
    ],
)
def test_what_cannot_be_configured(tmp_path, sections, said):
    assert said in message(train_ppo, small.ppo(tmp_path, tmp_path, **sections))


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


def test_what_values_and_scores_need_is_looked_for_before_the_first_stage(tmp_path):
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
    for sections, said in (
        (nowhere, "There is no folder"),
        (
            long,
            "data.max_prompt_length + data.max_response_length, to be scored by the reward model",
        ),
        ({"data": {"reward": {"path": str(equal), "eval_rows": 0}}}, "No pair is left of the 4 in"),
    ):
        assert said in message(run_rlhf, small.rlhf(tmp_path / "run", **sections))
        assert not (tmp_path / "run" / "sft" / "metrics.jsonl").exists()
