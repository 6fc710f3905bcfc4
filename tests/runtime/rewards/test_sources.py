"""The section `rewards`: its sources, their names, and errors in it."""

import pytest

from rlhf_jax.runtime.config import PPOConfig, parse, resolve
from rlhf_jax.runtime.parsing import to_yaml
from rlhf_jax.runtime.rewards.scorers import find_sources
from rlhf_jax.runtime.rewards.sources import RewardSource
from tests.runtime.messages import message
from tests.small import short_response


def names_of(reward_path, *sources, reward_fn=None):
    sources = find_sources(reward_path, [RewardSource(**each) for each in sources], reward_fn)
    return [(name, source.path, source.weight) for name, source, _ in sources]


def test_sources_and_their_names():
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
    assert names_of("x/hf", reward_fn=short_response) == [("short_response", None, 1.0)]
    assert [name for name, *_ in names_of("x/hf", {}, reward_fn=lambda *_: [])] == ["x", "lambda"]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([{}], "rewards: a source without path and function is the reward model of model.reward"),
        ([{"path": "a/x"}, {"path": "b/x/hf"}], "rewards: two sources are called 'x'; give one"),
        ([{"path": "a", "function": "b:c"}], "rewards: a source is a path or a function, but one"),
        ([{"path": "a", "weight": float("nan")}], "rewards.weight must be a finite number, but"),
        ([{"path": "a", "name": "a/b"}], "rewards: name must be letters, digits, points, hyphens"),
        ([{"path": "a", "label": -1}], "rewards: label must be 0 or more, and belongs to a rewar"),
        ([{"path": "a", "num_processes": 1}], "rewards: num_processes belongs to a function, but"),
        ([{"function": "a:b", "timeout": 1}], "rewards: timeout is of calls in other processes"),
        ([{"function": "a:b", "num_processes": -1}], "rewards.num_processes must not be negative"),
        ([{"function": "a:b", "label": 0}], "rewards: label must be 0 or more, and belongs to a"),
        ([{"function": "no_such:f"}], "'no_such:f' names no function (No module named"),
        ([{"function": "sys:path"}], "'sys:path' is not a function; write it as module:function."),
    ],
)
def test_wrong_sources(sources, expected):
    assert message(lambda: names_of(None, *sources)).startswith(expected)


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
    ("value", "expected"),
    [
        ([{"pth": "a"}], "Unknown key 'pth' (did you mean path?) in rewards; each has path, func"),
        ([{"path": "a", "weight": "x"}], "rewards: weight must be float, but is 'x'."),
        ({"path": "a"}, "rewards must be a list such as [{function: module:function}], but is "),
        ([{"path": "a", "function": "b:c"}], "rewards: a source is a path or a function, but"),
    ],
)
def test_wrong_sources_are_named_in_one_sentence(value, expected):
    assert message(resolve, PPOConfig, {"rewards": value}).startswith(expected)
