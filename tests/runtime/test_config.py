"""Configurations from files, flags and dicts, and what is said of wrong ones."""

import dataclasses
import itertools
import math
import typing

import pytest
import yaml

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.config import (
    EvaluateConfig,
    FilterConfig,
    GenerateConfig,
    PPOConfig,
    RewardConfig,
    RLHFConfig,
    SFTConfig,
    parse,
    resolve,
)
from rlhf_jax.runtime.help import help_text
from rlhf_jax.runtime.parsing import to_dict, to_yaml
from rlhf_jax.runtime.rewards.sources import RewardSource
from rlhf_jax.runtime.yaml_files import parsed_yaml

KINDS = (SFTConfig, RewardConfig, PPOConfig, RLHFConfig, GenerateConfig, EvaluateConfig)


@pytest.fixture
def written(tmp_path):
    """Writes a text to a file and gives the flags that read it."""

    def write(text):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return ["--config", str(file)]

    return write


def message(function, *arguments):
    """The one sentence that a call fails with."""
    with pytest.raises(InputError) as error:
        function(*arguments)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# --- right ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_arguments_all_are_defaults_and_yaml_brings_them_back(kind, written):
    assert parse(kind, []) == kind() == resolve(kind, {})
    assert parse(kind, written(to_yaml(kind()))) == kind()


def test_flags_lie_over_the_file_and_the_file_over_the_defaults(written):
    flags = written("ppo: {kl_coef: 1e-3, batch_size: 8, num_mini_batches: 2}\nseed: 3\n")
    config = parse(PPOConfig, [*flags, "--ppo.batch_size", "16", "--model.path=gpt2"])
    assert (config.ppo.kl_coef, config.ppo.batch_size, config.seed) == (1e-3, 16, 3)
    assert config.ppo.lam == PPOConfig().ppo.lam
    assert config.model.path == "gpt2"


def test_a_file_a_dict_and_flags_say_the_same(written, tmp_path):
    values = {"data": {"prompt_tokens": [4, 8], "columns": {"prompt": "text"}}, "seed": 7}
    flags = ["--data.prompt_tokens", "[4, 8]", "--data.columns", "{prompt: text}", "--seed", "7"]
    from_file = parse(SFTConfig, written(yaml.safe_dump(values)))
    assert from_file == resolve(SFTConfig, tmp_path / "config.yaml")
    assert from_file == resolve(SFTConfig, values) == parse(SFTConfig, flags)
    assert from_file.data.prompt_tokens == (4, 8)
    assert resolve(SFTConfig, from_file) is from_file


@pytest.mark.parametrize("text", ["", " ", "\n", "# Title", "12", "true", "[1]", "null text"])
def test_a_text_of_the_command_line_stays_as_it_is(text):
    assert parse(GenerateConfig, ["--prompt", text]).prompt == text
    assert parse(GenerateConfig, ["--prompt", "null"]).prompt is None
    config = parse(SFTConfig, ["--data.columns.prompt", "question", "--data.split_at", f"# {text}"])
    assert (config.data.split_at, config.data.columns) == (f"# {text}", {"prompt": "question"})


def test_null_and_numbers_arrive_as_their_types(written):
    config = parse(PPOConfig, written("model: {path: null}\nppo: {kl_coef: 1}\nrun_dir: '5'\n"))
    assert config.model.path is None
    assert config.ppo.kl_coef == 1.0
    assert config.run_dir == "5"
    assert parse(PPOConfig, ["--optimizer.max_grad_norm", "null"]).optimizer.max_grad_norm is None


def test_print_config_prints_and_ends(capsys, written):
    with pytest.raises(SystemExit) as ended:
        parse(PPOConfig, ["--ppo.kl_coef", "0.3", "--print_config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert parse(PPOConfig, written(printed)) == parse(PPOConfig, ["--ppo.kl_coef", "0.3"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_a_line_of_help(kind):
    text = help_text(kind, "rlhf COMMAND")
    assert text.startswith("usage: ")
    assert max(map(len, text.splitlines())) <= 80
    for name, section in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(section) and not name.startswith(("data", "optimizer", "ptx")):
            assert all(f"--{name}.{field.name} " in text for field in dataclasses.fields(section))


# --- wrong ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ppo.kl_ceof 1", "Unknown key 'ppo.kl_ceof' (did you mean kl_coef?); the section 'ppo'"),
        ("--ppo.kl_coe 1", "Unknown key 'ppo.kl_coe' (did you mean kl_coef?)"),
        ("--sead 1", "Unknown key 'sead' (did you mean seed?); there are model, tokenizer"),
        ("--pppo.kl_coef 1", "Unknown key 'pppo' (did you mean ppo?); there are model"),
        ("--sft.learning_rate 1", "Unknown key 'sft' (did you mean optimizer.learning_rate?); the"),
        ("--ppo.learning_rate 1", "Unknown key 'ppo.learning_rate' (did you mean optimizer.learn"),
        ("--max_length 1", "Unknown key 'max_length' (did you mean data.max_length or ptx.max_len"),
        (
            "--data.sft.path x",
            "Unknown key 'data.sft' (did you mean data.path?); the section 'data'",
        ),
        ("--ppo.batch_size x", "ppo.batch_size must be int, but is 'x'."),
        ("--ppo.batch_size 1.5", "ppo.batch_size must be int, but is '1.5'."),
        ("--ppo.adaptive_kl maybe", "ppo.adaptive_kl must be bool, but is 'maybe'."),
        ("--ppo.kl_estimator k9", "ppo.kl_estimator must be one of k1, k2, k3, but is 'k9'."),
        ("--seed a", "seed must be int, but is 'a'."),
        (
            "--model.attention cudnn --model.dtype float32",
            "The attention cudnn needs the dtype bfloat16 or float16, but it is float32;",
        ),
        ("--ppo.kl_coef null", "ppo.kl_coef must be float, but is null."),
        ("--ppo.kl_coef", "--ppo.kl_coef needs a value: --ppo.kl_coef VALUE."),
        (
            "--model.path.x 1",
            "--model.path is a setting and no section; --model.path.x is unknown.",
        ),
        ("train", "'train' is no option; settings are given as --section.key value."),
        ("--config no/such.yaml", "The configuration no/such.yaml cannot be read (No such file"),
        ("--config=/", "The configuration / cannot be read (Is a directory)"),
    ],
)
def test_wrong_flags_are_named_in_one_sentence(flags, said):
    assert message(parse, PPOConfig, flags.split()).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ppo: {kl_ceof: 1}", "Unknown key 'ppo.kl_ceof' (did you mean kl_coef?)"),
        ("sead: 1", "Unknown key 'sead' (did you mean seed?); there are"),
        ("data: {sft: {path: x}}", "Unknown key 'data.sft'; the section 'data' has"),
        ("ppo: {learning_rate: 1}", "Unknown key 'ppo.learning_rate' (did you mean optimizer.lear"),
        ("ppo: {kl_coef: abc}", "ppo.kl_coef must be float, but is 'abc'."),
        ("ppo: {batch_size: 1.5}", "ppo.batch_size must be int, but is 1.5."),
        ("ppo: {kl_coef: null}", "ppo.kl_coef must be float, but is null."),
        ("ppo:", "The section 'ppo' is empty; write one `key: value` to a line."),
        ("ppo: hello", "The section 'ppo' holds 'hello'; write"),
        ("ppo: [1]", "The section 'ppo' holds '[1]'; write"),
        ("", "FILE is empty; write"),
        ("1: 2", "1 is no key; keys are the names of settings."),
        ("- a", "FILE holds \"['a']\"; write"),
        ("ppo: {a: [", "FILE is not valid YAML: while parsing a flow node"),
        ("ppo:\n\tkl_coef: 1", "FILE is not valid YAML: while scanning for the next token"),
        ("ppo: {num_mini_batches: 3}", "ppo.batch_size = 128 is not divisible by ppo.num_mini_bat"),
        ("ppo: {kl_coef: 1}\nmesh: {data: 0}", "mesh.data, mesh.fsdp and mesh.tensor must be"),
    ],
)
def test_wrong_files_are_named_in_one_sentence(written, text, said):
    flags = written(text)
    assert message(parse, PPOConfig, flags).startswith(said.replace("FILE", flags[1]))


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(10 * [f'*{below}'])}]\n"
    for below, name in itertools.pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "line 6 unfolds to more than 100000 values"),
        ("a: &a {b: *a}", "line 1 has an alias of the value that it is part of"),
        ("seed: " + 3000 * "[", "line 1 is nested more than 50 deep"),
        ("seed: 1\nmodel: {n_layer: 2}\nseed: 3", "the key 'seed' of line 1 is in line 3 too"),
        ("model:\n  n_layer: 2\n  n_layer: 4", "the key 'n_layer' of line 2 is in line 3 too"),
        ("seed: " + 5000 * "9", "Exceeds the limit (4300 digits)"),
        ("seed: 2024-13-45", "month must be in 1..12"),
        ('seed: !!int ""', "a tag does not fit its value"),
        ("seed: !!bool foo", "a tag does not fit its value"),
        ("seed: !!timestamp foo", "a tag does not fit its value"),
    ],
)
def test_files_that_unfold_repeat_or_nest_are_named_at_once(written, text, said):
    flags = written(text)
    assert message(parse, SFTConfig, flags).startswith(f"{flags[1]} is not valid YAML: {said}")


def test_anchors_and_merged_keys_are_read(written):
    text = "x: &x {n_layer: 2, n_head: 2}\nmodel: {<<: *x, n_layer: 4}\n".replace(
        "x: ", "data: ", 1
    )
    assert parsed_yaml(text)["model"] == {"n_layer": 4, "n_head": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_every_float_is_finite(kind):
    """In each section, whatever its own limits are."""
    for key, annotation in settings_of(kind):
        if float in (annotation, *typing.get_args(annotation)):
            said = f"{key} must be a finite number, but is nan."
            assert message(parse, kind, [f"--{key}=.nan"]) == said


@pytest.mark.parametrize("value", [".inf", "-.inf", "nan", "1e999", "1" + 400 * "0"])
def test_every_way_to_write_a_float_that_is_not_finite_is_seen(value):
    said = message(parse, SFTConfig, ["--sft.num_epochs", value])
    assert said.startswith("sft.num_epochs must be a finite number, but is ")


def settings_of(kind, prefix=""):
    for name, annotation in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(annotation):
            yield from settings_of(annotation, f"{prefix}{name}.")
        elif name != "trainer":
            yield f"{prefix}{name}", annotation


def test_floats_of_a_configuration_built_in_python_are_finite_too():
    with pytest.raises(InputError, match=r"^rewards\.weight must be a finite number, but is nan"):
        RewardSource(function="a:b", weight=math.nan)
    with pytest.raises(InputError, match=r"^pass_threshold must be a finite number, but is nan"):
        FilterConfig(pass_threshold=math.nan)
    with pytest.raises(InputError, match=r"^seed must be from 0 to 2\^32 - 1, but is -1\.$"):
        PPOConfig(seed=-1)


def test_values_too_large_to_show_are_named():
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    said = "data.path must be str, but is a dict that is too large to show."
    assert message(resolve, SFTConfig, {"data": {"path": deep}}) == said
    said = "seed must be an int of 64 bits, but is a int that is too large to show."
    assert message(resolve, SFTConfig, {"seed": 10**5000}) == said


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 10**30])
def test_a_seed_has_a_key_of_its_own(seed):
    assert message(parse, SFTConfig, ["--seed", str(seed)]).startswith("seed must be ")
    assert parse(SFTConfig, ["--seed", str(2**32 - 1)]).seed == 2**32 - 1


@pytest.mark.parametrize("key", ["run_dir", "model.path", "data.path", "tokenizer.path", "config"])
def test_a_path_is_one_that_can_be_opened(key, written):
    value = "http://x/y"
    local = "a path or hub name" if key.endswith("path") else "a local path"
    said = f"is {value}: give {local}, or an address of gs://, s3://, az://, hf://."
    assert message(parse, PPOConfig, [f"--{key}", value]).endswith(f"{key} {said}")
    if key != "config":
        section, _, name = key.rpartition(".")
        text = f'{name}: "a\\0b"' if not section else f'{section}: {{{name}: "a\\0b"}}'
        said = f"{key} is 'a\\x00b', but a path has no NUL characters."
        assert message(parse, PPOConfig, written(text)) == said


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    said = f"The configuration {file} cannot be read ('utf-8' codec can't decode"
    assert message(parse, PPOConfig, ["--config", str(file)]).startswith(said)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ppo": {"kl_ceof": 1}}, "Unknown key 'ppo.kl_ceof' (did you mean kl_coef?)"),
        ({"seed": "x"}, "seed must be int, but is 'x'."),
        ({"ppo": None}, "The section 'ppo' is empty"),
        ({"data": {"sft": {"pth": 1}}}, "Unknown key 'data.sft.pth' (did you mean path?)"),
        (
            {"sft": {"learning_rate": 1}},
            "Unknown key 'sft.learning_rate' (did you mean optimizer.sft.learning_rate?); the sect",
        ),
        (
            {"rewards": [{"learning_rate": 1}]},
            "Unknown key 'learning_rate' in rewards; each has path",
        ),
        ({"optimizer": {"lr": 1}}, "Unknown key 'optimizer.lr'; the section 'optimizer' has sft,"),
    ],
)
def test_wrong_dicts_are_named_in_one_sentence(values, said):
    assert message(resolve, RLHFConfig, values).startswith(said)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("model", {"dropout": 1.0}, "model.dropout must be at least 0 and below 1, but is 1.0."),
        (
            "generation",
            {"top_p": 0.0},
            "generation.top_p must be above 0 and at most 1, but is 0.0",
        ),
        ("generation", {"batch_size": 0}, "generation.batch_size must be above 0, but is 0"),
        ("checkpoint", {"keep": 0}, "checkpoint.keep must be above 0, but is 0."),
    ],
)
def test_settings_are_checked_when_they_are_made(section, values, said):
    assert message(resolve, SFTConfig, {section: values}).startswith(said)


def test_evaluation_settings_are_checked_too():
    said = "evaluation.num_samples must not be negative, but is -1."
    assert message(resolve, PPOConfig, {"evaluation": {"num_samples": -1}}).startswith(said)


def test_configurations_are_frozen_and_hold_plain_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().seed = 1
    assert yaml.safe_load(to_yaml(PPOConfig())) == to_dict(PPOConfig())
    config = resolve(PPOConfig, {"data": {"prompt_tokens": [1, 2]}})
    assert to_dict(config)["data"]["prompt_tokens"] == [1, 2]


def test_a_token_is_a_text_or_an_id_and_stays_so_in_the_file(written):
    for text, token in ((".", "."), ("13", 13), ('"\\n"', "\n"), ("null", None)):
        config = parse(PPOConfig, written(f"ppo: {{truncate_token: {text}}}\n"))
        assert config.ppo.truncate_token == token
        assert parse(PPOConfig, written(to_yaml(config))) == config
    assert parse(PPOConfig, ["--ppo.truncate_token", "."]).ppo.truncate_token == "."


def test_the_sections_of_the_contract_are_there():
    shared = {"model", "tokenizer", "data", "optimizer", "mesh", "logging", "checkpoint"}
    for kind, own in ((SFTConfig, "sft"), (RewardConfig, "reward"), (PPOConfig, "ppo")):
        names = {field.name for field in dataclasses.fields(kind)}
        assert shared | {own, "seed", "run_dir"} <= names
