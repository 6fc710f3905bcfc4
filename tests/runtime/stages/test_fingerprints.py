"""The fingerprint of data and tokenizer that a checkpoint keeps."""

import json

import pytest

from rlhf_jax.data.settings import DataSettings
from rlhf_jax.runtime.config import PPOConfig, SFTConfig, resolve
from rlhf_jax.runtime.stages import shared
from rlhf_jax.runtime.stages.offline import PolicyStage
from tests import small


def fingerprint(examples, held_out=()):
    (values,) = shared.examples_fingerprint(
        DataSettings(), "text", examples, list(held_out)
    ).values()
    return tuple(values.values())


def test_every_character_and_the_order_count():
    first, second = {"text": "a", "n": 1}, {"text": "\ud800", "n": None}
    known = [
        fingerprint([first, second]),
        fingerprint([second, first]),
        fingerprint([first], [second]),
        fingerprint([first, {**second, "text": "b"}]),
        fingerprint([{**first, "n": 1.0}, second]),
        fingerprint([first, second, second]),
    ]
    assert len(set(known)) == len(known)
    assert fingerprint([{"n": 1, "text": "a"}, second]) == known[0]


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"a film {n}"}) + "\n" for n in range(20)))
    return file


def test_a_stage_and_a_finished_run_have_the_same_of_the_data(tmp_path, texts):
    data = {"path": str(texts), "eval_rows": 4, "max_length": 48}
    config = resolve(SFTConfig, small.sft(tmp_path / "run", data=data))
    stage = PolicyStage(config)
    ours = shared.data_fingerprints(config)
    name = f"The texts in {texts}"
    assert stage.fingerprints.keys() == {name, "The tokenizer"}
    assert ours == {name: stage.fingerprints[name]}
    assert ours[name]["the number of training examples"] == 16
    assert stage.fingerprints["The tokenizer"]["the number of tokens"] == len(stage.tokenizer)
    texts.write_text(texts.read_text().replace("film", "opera"))
    other = PolicyStage(config).fingerprints
    assert all(other[name] != stage.fingerprints[name] for name in other)


def test_texts_that_are_mixed_in_count(tmp_path, texts):
    config = small.ppo(tmp_path, "-", ptx={"path": str(texts), "eval_rows": 0})
    config["ppo"] |= {"ptx_coef": 0.5, "ptx_batch_size": 8}
    names = shared.data_fingerprints(resolve(PPOConfig, config))
    assert list(names) == ["The prompts in builtin", f"The texts in {texts}"]
