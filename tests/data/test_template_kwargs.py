"""`tokenizer.chat_template_kwargs`: variables of the chat template."""

import pytest

from rlhf_jax.data import encode_examples
from rlhf_jax.data.settings import RESERVED_TEMPLATE_KWARGS, DataSettings, TokenizerSettings
from rlhf_jax.data.tokenizers import use_chat_template_kwargs
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.commands.pipeline import stage_configs
from rlhf_jax.runtime.config import (
    EvaluateConfig,
    GenerateConfig,
    RLHFConfig,
    SFTConfig,
    parse,
    resolve,
)
from tests.data.texts import TEMPLATE, ids, turns
from tests.runtime.messages import message

# A prompt of the assistant closes its thoughts where they are switched off.
THINKING = TEMPLATE + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}"
)


@pytest.fixture
def chat(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    monkeypatch.setattr(tokenizer, "chat_template_kwargs", {})
    return tokenizer


@pytest.mark.parametrize("kind", ["prompts", "pairs", "rankings"])
def test_variables_reach_the_template_of_every_kind(chat, kind, caplog):
    question = turns("Was it dull?")[:1]
    example = {"prompt": question, "chosen": "a", "rejected": "b", "responses": ["a", "b"]}
    for kwargs, ending in (({}, ""), ({"enable_thinking": False}, "<think></think>")):
        use_chat_template_kwargs(chat, kwargs)
        if kind == "prompts":
            batch = encode_examples(kind, [example], chat, DataSettings())
            prompt = batch.prompts[0][batch.prompt_mask[0]].tolist()
            assert prompt == ids(chat, f"<user>Was it dull?\n<assistant>{ending}")
        elif kwargs:  # the answers have no such beginning, which is found
            with pytest.raises(InputError, match="renders the messages of example 1 differently"):
                encode_examples(kind, [example], chat, DataSettings())
        else:
            encode_examples(kind, [example], chat, DataSettings())
    assert not caplog.records


def test_variables_that_the_template_never_reads_are_one_warning(chat, caplog):
    use_chat_template_kwargs(chat, {"enable_thinking": True, "xml_tools": [], "depth": 3})
    (record,) = caplog.records
    assert record.getMessage() == (
        "The chat template never reads depth, xml_tools of tokenizer.chat_template_kwargs, which "
        "has no effect."
    )


def test_variables_that_a_template_sets_itself_are_read(chat, caplog, monkeypatch):
    default = "{% if depth is not defined %}{% set depth = 1 %}{% endif %}{{ depth }}"
    monkeypatch.setattr(chat, "chat_template", default)
    use_chat_template_kwargs(chat, {"depth": 3})
    assert not caplog.records
    monkeypatch.setattr(chat, "chat_template", None)
    use_chat_template_kwargs(chat, {"depth": 3})
    assert "never reads depth" in caplog.text


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "eos_token"])
def test_variables_that_the_program_gives_are_refused(name):
    with pytest.raises(InputError, match=f"has '{name}', which the program gives to the template"):
        TokenizerSettings(chat_template_kwargs={name: 1})


def test_all_arguments_of_transformers_are_refused(tokenizer):
    import inspect

    names = inspect.signature(tokenizer.apply_chat_template).parameters
    assert {*names} - {"documents", "kwargs"} <= {*RESERVED_TEMPLATE_KWARGS}


@pytest.mark.parametrize(
    "flags",
    [
        ["--tokenizer.chat_template_kwargs", "{enable_thinking: false, tags: [a, {b: 1.5}]}"],
        [
            "--tokenizer.chat_template_kwargs.enable_thinking=false",
            "--tokenizer.chat_template_kwargs.tags=[a, {b: 1.5}]",
        ],
    ],
)
def test_the_command_line(flags):
    kwargs = parse(SFTConfig, flags).tokenizer.chat_template_kwargs
    assert kwargs == {"enable_thinking": False, "tags": ["a", {"b": 1.5}]}


@pytest.mark.parametrize("value", ["3", "false", "[a]", "{1: 2}", "{a: {2: 3}}", "{a: .nan}"])
def test_values_that_are_no_mapping_are_one_sentence(value):
    said = message(parse, SFTConfig, [f"--tokenizer.chat_template_kwargs={value}"])
    allowed = "keys and values such as {enable_thinking: false}"
    assert said.startswith(f"tokenizer.chat_template_kwargs must be {allowed}, but is ")


@pytest.mark.parametrize("given", [{}, {"depth": 2}])
def test_generate_and_evaluate_inherit_them(tmp_path, given, capsys):
    (tmp_path / "run/hf").mkdir(parents=True)
    (tmp_path / "run/hf/config.json").write_text("{}")
    text = "data: {}\ntokenizer: {path: elsewhere, chat_template_kwargs: {depth: 1, tags: []}}\n"
    (tmp_path / "run/config.yaml").write_text(text)
    values = {
        "model": {"path": f"{tmp_path}/run/hf"},
        "tokenizer": {"chat_template_kwargs": given},
        "data": {"path": "other.jsonl"},
    }
    for kind in (GenerateConfig, EvaluateConfig):
        tokenizer = resolve(kind, values).tokenizer
        assert tokenizer.chat_template_kwargs == {"depth": 1, "tags": [], **given}
        assert tokenizer.path is None  # the one in hf/
    values.pop("tokenizer")
    resolve(GenerateConfig, values)
    assert "chat_template_kwargs {'depth': 1, 'tags': []}" in capsys.readouterr().err


def test_all_stages_of_a_pipeline_have_them():
    kwargs = {"enable_thinking": False}
    config = resolve(RLHFConfig, {"tokenizer": {"path": "a", "chat_template_kwargs": kwargs}})
    stages = stage_configs(config)
    assert [stage.tokenizer.chat_template_kwargs for stage in stages] == [kwargs] * 3
    assert [stage.tokenizer.path for stage in stages] == ["a", None, None]  # later ones in hf/
