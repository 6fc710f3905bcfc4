"""`generate` and `evaluate` read data as the run did whose model they open."""

import pytest
import yaml

from rlhf_jax.runtime.config import EvaluateConfig, GenerateConfig, SFTConfig, parse, resolve
from tests.runtime.messages import message

DATA = {
    "path": "posts.jsonl",
    "columns": {"prompt": "post"},
    "eval_rows": 7,
    "seed": 3,
    "max_prompt_length": 40,
    "prompt_suffix": "TL;DR:",
    "prompt_tokens": [2, 8],
}


@pytest.fixture
def run(tmp_path):
    """A run folder whose model is only a name."""
    (tmp_path / "run/hf").mkdir(parents=True)
    (tmp_path / "run/hf/config.json").write_text("{}")
    content = {"model": {"path": None}, "data": {**DATA, "gone": 1}, "sft": {}}
    (tmp_path / "run/config.yaml").write_text("# a comment\n" + yaml.safe_dump(content))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (GenerateConfig, ["--model.path"]),
        (EvaluateConfig, ["--kind=text", "--model.path"]),
        (EvaluateConfig, ["--kind=pairs", "--model.path=elsewhere", "--model.reward_path"]),
    ],
)
def test_data_settings_are_those_of_the_run(run, capsys, kind, flags):
    data = parse(kind, [*flags, f"{run}/hf/"]).data
    assert (data.path, data.columns, data.eval_rows) == ("posts.jsonl", {"prompt": "post"}, 7)
    assert (data.max_prompt_length, data.max_length, data.prompt_tokens) == (40, 256, (2, 8))
    assert data.prompt_suffix == "TL;DR:"
    error = capsys.readouterr().err
    assert error.startswith(f"settings of {run}/config.yaml: ")
    assert "data.max_prompt_length 40" in error
    assert "packing" not in error  # a default


def test_settings_of_the_command_override_those_of_the_run(run, tmp_path, capsys):
    model = {"model": {"path": f"{run}/hf"}}
    data = resolve(EvaluateConfig, {**model, "data": {"eval_rows": 2, "prompt_suffix": None}}).data
    assert (data.path, data.eval_rows, data.prompt_suffix) == ("posts.jsonl", 2, None)

    other = resolve(EvaluateConfig, {**model, "data": {"path": "other.jsonl"}}).data
    assert (other.path, other.columns, other.eval_rows, other.seed) == ("other.jsonl", {}, None, 0)
    assert (other.max_prompt_length, other.prompt_suffix) == (40, "TL;DR:")

    file = tmp_path / "flags.yaml"
    file.write_text("data: {max_prompt_length: 9}\n")
    flags = ["--config", str(file), "--data.prompt_tokens", "[1, 2]", "--model.path", f"{run}/hf"]
    data = parse(GenerateConfig, flags).data
    assert (data.max_prompt_length, data.prompt_tokens, data.eval_rows) == (9, (1, 2), 7)


def test_only_commands_that_open_a_finished_model_inherit(run):
    assert parse(SFTConfig, ["--model.path", f"{run}/hf"]).data == SFTConfig().data
    assert parse(GenerateConfig, ["--model.path", str(run)]).data == GenerateConfig().data
    assert parse(GenerateConfig, []).data.max_prompt_length > 10**6  # as the model allows
    (run / "config.yaml").write_text("kind: text\ndata: {max_length: 99}\n")  # of an evaluation
    assert parse(GenerateConfig, ["--model.path", f"{run}/hf"]).data == GenerateConfig().data


@pytest.mark.parametrize("text", ["a: [", "", "data: 3", "model: {}"])
def test_a_damaged_configuration_of_the_run_is_one_sentence(run, text):
    (run / "config.yaml").write_text(text)
    error = message(parse, GenerateConfig, ["--model.path", f"{run}/hf"])
    assert error.startswith(f"{run}/config.yaml, which has the settings of the model's run, ")
    assert "\n" not in error
