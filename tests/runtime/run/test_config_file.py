"""The `config.yaml` of a run folder: who may continue, and what a damaged one costs."""

import pytest
import yaml

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.config import (
    SFTConfig,
    resolve,
)
from rlhf_jax.runtime.run.folder import claim_run_dir, reopen
from tests.runtime.test_config import message


def claim(folder, **values):
    config = resolve(SFTConfig, {**values, "run_dir": str(folder)})
    claim_run_dir(config)
    reopen(config)
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_folder_with_work_refuses_another_configuration(tmp_path):
    claim(tmp_path, seed=1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert message(lambda: claim(tmp_path, seed=2)) == (
        f"The run folder {tmp_path} was made with another configuration: seed is 1 there and 2 "
        "here; choose another --run_dir, or give the same configuration to continue that run."
    )
    nested = message(lambda: claim(tmp_path, seed=1, sft={"batch_size": 3}))
    assert "sft.batch_size is 16 there and 3 here" in nested
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1


def test_a_run_that_goes_on_has_no_model_of_an_earlier_end(tmp_path):
    claim(tmp_path)
    files = [tmp_path / "hf" / "config.json", tmp_path / "adapter" / "adapter_config.json"]
    for file in files:
        file.parent.mkdir()
        file.touch()
    claim(tmp_path)
    assert not any(file.exists() for file in files)


def test_before_the_first_step_the_configuration_may_change(tmp_path):
    """Samples of the initial model, and log-probabilities with a mark, are no results."""
    claim(tmp_path, seed=1)
    (tmp_path / "reference.npz").touch()
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n')
    assert claim(tmp_path, seed=2)["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "reference.npz"]


def test_what_computes_attention_may_change_and_an_earlier_version_had_one(tmp_path):
    there = claim(tmp_path)
    assert there["model"].pop("attention") == "blocks"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(there))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert claim(tmp_path, model={"attention": "cudnn"})["model"]["attention"] == "cudnn"


def test_a_key_that_an_earlier_version_had_not_is_as_by_default(tmp_path):
    there = claim(tmp_path, seed=1)
    del there["sft"]["batch_size"], there["seed"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(there))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "seed is 0 there and 1 here" in message(lambda: claim(tmp_path, seed=1))
    assert "sft.batch_size is 16 there" in message(lambda: claim(tmp_path, sft={"batch_size": 3}))
    assert claim(tmp_path)["sft"]["batch_size"] == 16


def test_how_a_run_is_watched_saved_and_spread_may_change(tmp_path):
    claim(tmp_path, seed=1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    changed = {"logging": {"log_every": 5}, "checkpoint": {"every": 7}, "mesh": {"data": 1}}
    there = claim(tmp_path, seed=1, **changed)
    assert (there["logging"]["log_every"], there["checkpoint"]["every"]) == (5, 7)


def test_a_folder_without_work_takes_another_configuration(tmp_path):
    claim(tmp_path, seed=1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.yaml").touch()
    assert claim(tmp_path, seed=2)["seed"] == 2
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "seed is 2 there and 3 here" in message(lambda: claim(tmp_path, seed=3))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*/file/run: Not a directory; give"):
        claim(tmp_path / "file" / "run")


@pytest.mark.parametrize("run_dir", ["", "http://x/y", "a\0b"])
def test_a_folder_of_a_configuration_built_in_python_is_checked_too(run_dir):
    assert message(claim_run_dir, SFTConfig(run_dir=run_dir)).startswith("run_dir is ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xec\x00\xff", "'utf-8' codec can't decode byte 0xec in position 0"),
        (b"a:\n\tb", "while scanning for the next token found character"),
        (b"- 1", "it holds '[1]'; write one `key: value` to a line."),
        (b"", "it is empty; write one `key: value` to a line."),
    ],
)
def test_a_damaged_configuration_without_any_checkpoint_is_named(tmp_path, content, reason):
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    said = message(lambda: claim(tmp_path))
    assert said.startswith(f"{tmp_path}/config.yaml is damaged ({reason}")
    assert said.endswith("put it back from a copy, or choose another --run_dir.")
    (tmp_path / "metrics.jsonl").unlink()
    assert claim(tmp_path)["seed"] == 0
