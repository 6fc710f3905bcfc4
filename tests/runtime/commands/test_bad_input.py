"""Mistakes of the user are reported in one sentence, before anything is trained."""

import json
import logging

import pytest

from rlhf_jax.data import builtin, train_tokenizer
from rlhf_jax.models.huggingface import load_pretrained, save_pretrained
from rlhf_jax.runtime import (
    run_evaluate,
    run_generate,
    run_rlhf,
    train_ppo,
    train_reward,
    train_sft,
)
from tests import small
from tests.runtime.messages import message


@pytest.fixture
def jsonl(tmp_path):
    """Writes examples to a file and returns its path."""

    def write(*examples):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in examples))
        return str(file)

    return write


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"words": "a"}\n', "has the columns words, but text examples need `prompt`"),
        ("", "is empty: give a file with at least one example."),
        ('{"text": "a"}\n{"text": 5}\n', "column 'text' holds a number (5), not text."),
        ('{"text": "a"}\n{"text": null}\n', "column 'text' holds nothing: give it a text."),
        ('{"text": "a"}\n{"text"\n', "is no JSON"),
    ],
)
def test_a_file_that_cannot_be_trained_on(tmp_path, content, said):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    config = small.sft(tmp_path / "run", data={"path": str(file), "eval_rows": 0})
    sentence = message(train_sft, config)
    assert said in sentence
    assert str(file) in sentence


def test_a_file_that_is_not_there(tmp_path):
    config = small.sft(tmp_path / "run", data={"path": "no/such.jsonl"})
    assert message(train_sft, config).startswith(
        "There is no file or folder no/such.jsonl: give one that exists, the name of a data set on "
        'the hub, or "builtin".'
    )


@pytest.mark.newest
def test_nothing_left_of_the_pairs(tmp_path, jsonl, sft_run):
    path = jsonl({"chosen": "same", "rejected": "same"}, {"chosen": "a", "rejected": ""})
    config = small.reward(
        tmp_path / "run", sft_run[0], data={"path": path, "eval_rows": 0, "builtin_rows": 1}
    )
    assert message(train_reward, config).startswith(
        "No pair is left: of 2, 1 have an empty response and 1 have two that are equal"
    )


def test_nothing_left_of_the_rankings(tmp_path, jsonl, sft_run):
    path = jsonl({"responses": ["one"]}, {"responses": ["same", "same"]})
    config = small.reward(
        tmp_path / "run",
        sft_run[0],
        data={"path": path, "eval_rows": 0},
        reward={"objective": "ranking", "batch_size": 8, "eval_batch_size": 8},
    )
    assert message(train_reward, config).startswith(
        "No ranking is left: of 2, none has two responses that are neither empty nor equal within"
    )
    pairs = {**config, "run_dir": str(tmp_path / "pairs"), "reward": {}}
    assert message(train_reward, pairs) == (
        f"Line 1 of {path}: column 'responses' is no list of two or more texts, best "
        "first: ['one']."
    )


def test_an_objective_that_is_none(tmp_path, sft_run):
    config = small.reward(tmp_path, sft_run[0], reward={"objective": "listwise"})
    sentence = message(train_reward, config)
    assert sentence.startswith(
        "reward.objective must be one of last_token, tokenwise, ranking, but is"
    )


def test_dropped_and_truncated_examples_are_one_counted_warning_each(
    tmp_path, jsonl, sft_run, caplog
):
    good = {"chosen": "It was good and long " * 20, "rejected": "bad"}
    path = jsonl(*[good] * 8, {"chosen": "same", "rejected": "same"})
    config = small.reward(tmp_path / "run", sft_run[0], data={"path": path, "eval_rows": 0})
    with caplog.at_level(logging.WARNING, "rlhf_jax.data"):
        train_reward({**config, "reward": {"batch_size": 8, "eval_batch_size": 8}})
    said = [record.getMessage() for record in caplog.records if record.name == "rlhf_jax.data"]
    assert len(said) == 2
    assert any(text.startswith("1 of 9 pairs") for text in said), said
    assert any(text.startswith("8 of ") and "lost their right end" in text for text in said), said


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.newest
def test_examples_longer_than_the_model_has_positions(tmp_path, sft_run, reward_run):
    sft, rewarded = sft_run[0], reward_run[0]
    assert message(train_sft, small.sft(tmp_path, data={"max_length": 65})) == (
        "data.max_length = 65 exceeds the model's n_positions = 64; shorten it, or use a model "
        "with more positions."
    )
    config = small.reward(tmp_path, sft, data={"max_response_length": 49})
    assert message(train_reward, config).startswith(
        "data.max_prompt_length + data.max_response_length = 65 exceeds the model's n_positions"
    )
    config = small.ppo(tmp_path, sft, rewarded, ppo={"response_length": 49})
    assert message(train_ppo, config).startswith(
        "data.max_prompt_length + ppo.response_length = 65 exceeds the model's n_positions = 64;"
    )
    config = small.sft(tmp_path, generation={"max_new_tokens": 64})
    assert message(train_sft, config).startswith(
        "generation.max_new_tokens = 64 leaves no room for a prompt in the model's n_positions"
    )


def test_minibatches_that_do_not_divide_the_batch(tmp_path, sft_run, reward_run):
    config = small.ppo(tmp_path, sft_run[0], reward_run[0], ppo={"num_mini_batches": 3})
    assert message(train_ppo, config) == (
        "ppo.batch_size = 8 is not divisible by ppo.num_mini_batches = 3; change one of them."
    )


def test_a_mesh_that_does_not_fit_the_devices(tmp_path):
    assert message(train_sft, small.sft(tmp_path, mesh={"data": 3})) == (
        "mesh data x fsdp x tensor = 3 x 1 x 1 does not fit 1 devices; let them multiply to that, "
        "or set one to -1."
    )


def test_all_of_a_run_is_checked_before_its_first_stage(tmp_path, capsys):
    wrong = {
        "data": {**small.rlhf("-")["data"], "ppo": {"path": "no/such.jsonl"}},
        "ppo": {"response_length": 60},
        "reward": {"batch_size": 8, "eval_batch_size": 0},
        "evaluation": {"gold_fn": "no_such_module:score"},
    }
    said = {
        "data": "There is no file or folder no/such.jsonl",
        "ppo": "data.max_prompt_length + ppo.response_length = 76 exceeds",
        "reward": "reward.eval_batch_size must be above 0, but is 0.",
        "evaluation": "'no_such_module:score' names no function (No module named",
    }
    for section, values in wrong.items():
        sentence = message(run_rlhf, small.rlhf(tmp_path, **{section: values}))
        assert sentence.startswith(said[section])
    endless = {"missing_eos_score": -1.0, "stop_at_eos": False}
    sentence = message(run_rlhf, small.rlhf(tmp_path, ppo=endless))
    assert "need responses that can end" in sentence
    # Also where the tokenizer is yet to be trained.
    sentence = message(run_rlhf, small.rlhf(tmp_path, ppo={"truncate_token": ". no token"}))
    assert sentence.startswith("ppo.truncate_token = '. no token' is ")
    # Each attempt may put right what the last one had wrong, since nothing was done.
    assert not list(tmp_path.glob("**/metrics.jsonl"))


# --- models and tokenizers -----------------------------------------------------------------------


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path, sft_run):
    tokenizer = train_tokenizer((row["completion"] for row in builtin.texts(0, 100)), 400)
    tokenizer.save_pretrained(tmp_path / "other")
    model, other = f"{sft_run[0]}/hf", str(tmp_path / "other")
    config = small.sft(tmp_path / "run", model={"path": model}, tokenizer={"path": other})
    assert message(train_sft, config) == (
        f"The tokenizer has {len(tokenizer)} tokens, but the model in {model} has a vocab_size of "
        "300; use the tokenizer that the model was made with."
    )


def test_pairs_are_evaluated_with_the_reward_models_own_tokenizer(tmp_path, reward_run):
    tokenizer = train_tokenizer((row["completion"] for row in builtin.texts(0, 100)), 290)
    tokenizer.save_pretrained(tmp_path / "other")
    config = {
        "kind": "pairs",
        "model": {"reward_path": f"{reward_run[0]}/hf"},
        "tokenizer": {"path": str(tmp_path / "other")},
        "run_dir": str(tmp_path),
    }
    assert message(run_evaluate, config) == (
        f"The reward model in {reward_run[0]}/hf has another tokenizer than tokenizer.path; leave "
        "that out, for a reward model is evaluated with its own."
    )


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("no token", "ppo.truncate_token = 'no token' is "),
        (300, "ppo.truncate_token = 300 is no id of the tokenizer, which has 300 tokens; give"),
    ],
)
def test_a_truncate_token_that_the_tokenizer_does_not_have(tmp_path, sft_run, token, said):
    config = small.ppo(tmp_path, sft_run[0], ppo={"truncate_token": token})
    assert message(train_ppo, config, small.short_response).startswith(said)


def test_models_that_are_missing_or_of_another_kind(tmp_path, sft_run):
    sft = sft_run[0]
    assert message(train_ppo, small.ppo(tmp_path, sft)).startswith("PPO needs a reward: give")
    config = small.ppo(tmp_path, sft, model={"path": None})
    assert message(train_ppo, config, small.short_response).startswith(
        "PPO starts from a trained policy: give --model.path a folder or hub name."
    )
    assert message(train_ppo, small.ppo(tmp_path, "/no/such")).startswith("PPO needs a reward")
    sentence = message(train_ppo, small.ppo(tmp_path, "/no/such"), small.short_response)
    assert sentence.startswith("There is no folder /no/such/hf")
    sentence = message(train_ppo, small.ppo(tmp_path, sft, sft))  # a language model has no head
    assert "score" in sentence
    assert str(sft) in sentence


def test_a_folder_without_a_tokenizer(tmp_path, sft_run):
    model, params = load_pretrained(sft_run[0] / "hf")
    save_pretrained(tmp_path / "bare", model, params)
    config = small.sft(tmp_path / "run", model={"path": str(tmp_path / "bare")})
    assert message(train_sft, config).startswith(
        f"The folder {tmp_path / 'bare'} holds no tokenizer that can be read"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:score", "'no_such_module:score' names no function (No module named"),
        ("json:no_such", "'json:no_such' names no function (module 'json' has no attribute"),
        ("json", "'json' names no function"),
        ("", "'' names no function"),
        ("sys:path", "'sys:path' is not a function; write it as module:function."),
    ],
)
def test_a_gold_score_that_is_no_function(tmp_path, sft_run, name, said):
    config = small.ppo(tmp_path, sft_run[0], evaluation={"gold_fn": name})
    assert message(train_ppo, config, small.short_response).startswith(said)


# --- run folders ---------------------------------------------------------------------------------


def test_the_folder_of_another_run_is_left_alone(sft_run):
    folder = sft_run[0]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert message(train_sft, small.sft(folder, seed=1)) == (
        f"The run folder {folder} was made with another configuration: seed is 0 there and 1 here; "
        "choose another --run_dir, or give the same configuration to continue that run."
    )
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_folder_that_cannot_be_written_is_refused_before_the_data_are_read(tmp_path):
    (tmp_path / "file").touch()
    config = small.sft(tmp_path / "file" / "run", data={"path": "no/such.jsonl"})
    assert message(train_sft, config).startswith(
        f"cannot write to {tmp_path}/file/run: Not a directory; give another --run_dir"
    )
    assert message(train_sft, small.sft("/proc/run")).startswith("cannot write to /proc/run: ")


# --- the other commands --------------------------------------------------------------------------


def test_generate_and_evaluate_say_what_they_need(tmp_path, sft_run):
    hf = f"{sft_run[0]}/hf"
    assert message(run_generate, {"prompt": "hi"}) == (
        "generate needs a model: give --model.path a folder or hub name."
    )
    config = {
        "model": {"path": hf},
        "prompt": "hi",
        "output": f"{tmp_path}/no/such/file",
        "generation": {"max_new_tokens": 4},
    }
    assert message(run_generate, config) == (
        f"cannot write to {tmp_path}/no/such/file: No such file or directory; give --output a file "
        "that can be written."
    )
    assert message(run_evaluate, {"kind": "text", "run_dir": str(tmp_path)}) == (
        "This evaluation needs --model.path: a folder or hub name of a model."
    )
    assert message(run_evaluate, {"kind": "pairs", "run_dir": str(tmp_path)}).startswith(
        "This evaluation needs --model.reward_path"
    )


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        (
            "text",
            {"max_length": 256},
            "data.max_length = 256 exceeds the model's n_positions = 64;",
        ),
        (
            "pairs",
            {"max_prompt_length": 64, "max_response_length": 192},
            "data.max_prompt_length + data.max_response_length = 256 exceeds",
        ),
        (
            "policy",
            {"max_prompt_length": 128},
            "data.max_prompt_length + generation.max_new_tokens = 192 exceeds",
        ),
    ],
)
def test_evaluation_does_not_read_past_the_positions(
    tmp_path, sft_run, reward_run, kind, data, said
):
    model = {"path": f"{sft_run[0]}/hf", "reward_path": f"{reward_run[0]}/hf"}
    config = {"kind": kind, "model": model, "data": data, "run_dir": str(tmp_path)}
    assert message(run_evaluate, config).startswith(said)
