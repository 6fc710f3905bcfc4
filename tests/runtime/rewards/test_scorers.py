"""Scores by reward models of tokens and of texts, by functions, and sums of several."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax.data import builtin, train_tokenizer
from rlhf_jax.data.encoding import encode, pad_left, pad_right
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.huggingface import load_reward_model, save_reward_model
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.parallel import MeshSettings, make_mesh
from rlhf_jax.runtime import loading
from rlhf_jax.runtime.rewards.scorers import (
    FunctionScorer,
    ModelScorer,
    Rewards,
    check_sources_call,
    find_sources,
    load_rewards,
    means_of_parts,
)
from rlhf_jax.runtime.rewards.sources import RewardSource
from rlhf_jax.runtime.rewards.texts import Responses, reference_tokens, retokenize
from tests.runtime.messages import message

MESH = make_mesh(MeshSettings())
PROMPTS = ["The film was", "I", "Quite another XYZ; than the tokenizer knows"]
ANSWERS = [" good.", " saw it in the end and slept", " bad"]
REFERENCES = [" fine.", " liked it", " a film"]
ENDED = [True, False, True]


def tiny_scorer(tokenizer, n_positions):
    """(model, parameters) of a reward model for a tokenizer."""
    config = GPT2Config(len(tokenizer), n_positions, n_embd=8, n_layer=1, n_head=2)
    model = GPT2(dataclasses.replace(config, pad_token_id=tokenizer.pad_token_id))
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return model, {"model": params, "head": {"kernel": np.arange(8, dtype=np.float32)}}


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
    for name, tokenizer, n_positions in (
        ("same", bytes_tokenizer, 64),
        ("other", other_tokenizer, 16),
    ):
        save_reward_model(folder / name / "hf", *tiny_scorer(tokenizer, n_positions), tokenizer)
    return folder


def responses_of(tokenizer, texts=(ANSWERS,), ended=(ENDED,), prompts=PROMPTS):
    """Prompts and one or more answers to each as tokens of a tokenizer."""
    candidates = []
    for answers, have_eos in zip(texts, ended, strict=True):
        ids = encode(tokenizer, answers)
        eos = tokenizer.eos_token_id
        sequences = [[*row, eos] if end else row for row, end in zip(ids, have_eos, strict=True)]
        candidates.append(pad_right(sequences, max(map(len, sequences)) + 2))
    sequences = [row or [tokenizer.bos_token_id] for row in encode(tokenizer, prompts)]
    padded = pad_left(sequences, max(map(len, sequences)) + 3)
    columns = {"answer": list(range(len(prompts)))}
    return Responses(tokenizer, *padded, candidates, columns, np.arange(len(prompts)) + 5)


def load(tokenizer, *sources, reward_path=None, reward_fn=None):
    named = find_sources(reward_path, [RewardSource(**each) for each in sources], reward_fn)
    return load_rewards(named, ModelSettings(), tokenizer, MESH)


def by_hand(folder, tokenizer, texts=(ANSWERS,), ended=(ENDED,)):
    """Scores [N] of each list of texts: prompt and response as one row, padded on the right."""
    model, params = load_reward_model(folder / "hf")
    n_positions = model.config.n_positions
    responses = [
        [row + [tokenizer.eos_token_id] * end for row, end in zip(encode(tokenizer, answers), ends)]
        for answers, ends in zip(texts, ended)
    ]
    scores = []
    hidden = jax.jit(model.hidden)
    for column in responses:
        rooms = [n_positions - max(map(len, row)) for row in zip(*responses)]
        prompts = [row[-room:] for row, room in zip(encode(tokenizer, PROMPTS), rooms)]
        sequences = [prompt + response for prompt, response in zip(prompts, column)]
        states = np.asarray(hidden(params["model"], *pad_right(sequences, n_positions)))
        last = np.stack([states[i, len(row) - 1] for i, row in enumerate(sequences)])
        scores.append(last @ np.asarray(params["head"]["kernel"]))
    return scores


def test_responses_end_with_any_stop_token(bytes_tokenizer):
    tokens = np.array([[5, 7, 0], [7, 5, 0], [5, 3, 0], [3, 5, 8]])
    candidates = [(tokens, np.array([[1, 1, 0]] * 3 + [[1, 1, 1]], bool))]
    responses = Responses(bytes_tokenizer, None, None, candidates, {}, [], (3, 7))
    assert responses.ended[0].tolist() == [True, False, True, False]
    eos = dataclasses.replace(responses, stop_token_ids=())
    assert not eos.ended[0].any()


# --- reward models -------------------------------------------------------------------------------


def test_texts_that_round_trip_score_as_their_tokens_do(bytes_tokenizer):
    """One reward model two ways; a prompt without text is a single token."""
    model, params = tiny_scorer(bytes_tokenizer, 64)
    prompts = [*PROMPTS[:2], ""]
    responses = responses_of(bytes_tokenizer, (ANSWERS, REFERENCES), (ENDED, [True] * 3), prompts)
    by_tokens = ModelScorer(model, params, MESH)(params, responses, 3)
    by_texts = ModelScorer(model, params, MESH, bytes_tokenizer)(params, responses, 2)
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
    scores, parts = scorer(params, responses, 2)
    expected = by_hand(folders / "other", other_tokenizer, texts, ended)
    np.testing.assert_allclose(parts["objective/raw_scores"], expected[0], rtol=1e-4)
    np.testing.assert_allclose(parts["objective/reference_scores"], expected[1], rtol=1e-4)
    np.testing.assert_allclose(scores, np.subtract(*expected), rtol=1e-4, atol=1e-5)
    scorer(params, responses, 2)
    warnings = [record.getMessage() for record in caplog.records if record.name == "rlhf_jax.data"]
    # Only the first call warns.
    assert warnings == ["1 of 3 prompts or responses were cut to the reward model's 16 positions."]


def test_texts_are_cut_to_the_positions_and_something_is_left(other_tokenizer):
    long = "a film " * 40
    prompts, (first, second), cut = retokenize(
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
    scorer = ModelScorer(model, params, MESH, bytes_tokenizer)
    for length in range(1, 9):
        texts = [["x" * length] * 3]
        scorer(params, responses_of(bytes_tokenizer, texts, prompts=PROMPTS[:2] + ["I"]), 3)
    assert scorer._score._cache_size() == 2  # of 8 and, with EOS, of 16 tokens


def test_which_tokenizers_are_the_same(bytes_tokenizer, other_tokenizer):
    padded = train_tokenizer(["none"], 258)
    padded.add_special_tokens({"pad_token": "<|another|>"})
    assert loading.shares_tokens(bytes_tokenizer, padded)
    assert not loading.shares_tokens(padded, bytes_tokenizer)
    assert not loading.shares_tokens(bytes_tokenizer, other_tokenizer)
    from tokenizers import Tokenizer

    merged = json.loads(other_tokenizer.backend_tokenizer.to_str())
    merged["model"]["merges"] = merged["model"]["merges"][::-1]
    reversed_ = type(other_tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(merged)))
    assert reversed_.get_vocab() == other_tokenizer.get_vocab()
    assert not loading.shares_tokens(other_tokenizer, reversed_)


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
    scores, parts = scorer(params, responses, 3)
    (same,) = by_hand(folders / "same", bytes_tokenizer)
    (other,) = by_hand(folders / "other", other_tokenizer)
    gold, length = builtin.gold_scores(PROMPTS, ANSWERS), lengths(PROMPTS, ANSWERS)
    expected = 2.0 * same - 0.5 * other + length
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    values = {"same": same, "judge": other, "gold_scores": gold, "lengths": length}
    assert parts.keys() == {f"objective/rewards/{name}" for name in values}
    for name, value in values.items():
        np.testing.assert_allclose(parts[f"objective/rewards/{name}"], value, rtol=1e-4)


def test_a_function_scores_each_reference_once(bytes_tokenizer):
    seen = []

    def judge(prompts, completions, *, answer):
        seen.append((prompts, completions, answer))
        return lengths(prompts, completions)

    scorer = Rewards(["judge"], [3.0], [FunctionScorer(judge)])
    responses = responses_of(bytes_tokenizer, (ANSWERS, REFERENCES), (ENDED, [True] * 3))
    scores, parts = scorer((), responses, 3)
    difference = np.subtract(lengths(PROMPTS, ANSWERS), lengths(PROMPTS, REFERENCES))
    np.testing.assert_array_equal(scores, 3.0 * difference)
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


def test_scores_beyond_float32_are_refused(bytes_tokenizer):
    def huge(prompts, completions, **columns):
        return [1e39 for _ in completions]

    scorer = Rewards(["huge"], [1.0], [FunctionScorer(huge)])
    error = message(scorer, (), responses_of(bytes_tokenizer), 3)
    assert error.startswith("The scores of huge come to inf")


def test_references_may_be_messages_and_end_once():
    tokenizer = train_tokenizer(["none"], 258)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "You"}]
    sequences = [
        {"prompt": turns[0], "completion": turns[1]},
        {"prompt": "a", "completion": "bcdef"},
    ]
    settings = DataSettings(max_response_length=5)
    tokens, mask = reference_tokens(sequences, tokenizer, settings)
    eos = tokenizer.eos_token_id
    assert tokens[0][mask[0]].tolist() == [*tokenizer("You")["input_ids"], eos]
    assert tokens[1][mask[1]].tolist() == tokenizer("bcdef")["input_ids"]  # EOS was cut


def of_turns(prompts, completions, *, answer, completion_ids, factor=1.0, **columns):
    """A reward that shows what it gets; None for the second response."""
    assert prompts[0] == [{"role": "user", "content": "Well?"}]
    assert prompts[1] == PROMPTS[1]
    assert completions[:2] == [[{"role": "assistant", "content": ANSWERS[0]}], ANSWERS[1]]
    lengths = [len(ids) for ids in completion_ids]
    return [None if n == 1 else factor * lengths[n] + answer[n] for n in range(3)]


def test_functions_get_messages_tokens_and_arguments_and_may_not_apply(bytes_tokenizer):
    turns = [[{"role": "user", "content": "Well?"}], PROMPTS[1], PROMPTS[2]]
    responses = dataclasses.replace(responses_of(bytes_tokenizer), turns=turns)
    own = {"function": f"{__name__}:of_turns", "kwargs": {"factor": 2.0}, "conversations": True}
    lengths = {"function": "rlhf_jax.rewards:length_penalty", "weight": 0.5}
    lengths |= {"kwargs": {"target": 4, "unit": "characters"}, "num_processes": 1, "timeout": 60}
    sources = find_sources(None, [RewardSource(**own), RewardSource(**lengths)])
    check_sources_call(sources, ["answer"])
    rewards, _ = load_rewards(sources, ModelSettings(), bytes_tokenizer, MESH)
    scores, parts = rewards((), responses, 8)
    sizes = np.array([len(text) for text in ANSWERS])
    applying = np.array([2.0 * (sizes[0] + 1), 0.0, 2.0 * (sizes[2] + 1) + 2.0])
    np.testing.assert_allclose(scores, applying - 0.5 * np.abs(sizes - 4) / 4, rtol=1e-6)
    means = means_of_parts(parts)
    assert means["objective/rewards/of_turns"] == pytest.approx(applying[[0, 2]].mean())
    assert means["objective/failed_scores/length_penalty"] == 0.0
    alone, _ = load_rewards(sources[:1], ModelSettings(), bytes_tokenizer, MESH)
    expected = f"of_turns gave None for the completion {ANSWERS[1]!r}; at least one reward has to"
    assert message(alone, (), responses, 8).startswith(expected)
    assert "has 'factor' in kwargs, which is a column" in message(
        check_sources_call, sources, ["factor"]
    )
