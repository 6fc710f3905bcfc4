"""Writing of folders in Hugging Face's format: interruptions, full disks, the tokenizer."""

import dataclasses
import resource
import signal

import jax.numpy as jnp
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import huggingface, writing
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.models.huggingface import (
    load_pretrained,
    save_pretrained,
    save_reward_model,
)
from tests.models.gpt2_folders import (
    CONFIG,
    HEAD,
    MODEL,
    PARAMS,
    random_params,
)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_changes_nothing(folder, monkeypatch, interruption):
    before = contents(folder)

    def half_written(path, shapes, tensors):
        path.write_bytes(b"half")
        raise interruption

    monkeypatch.setattr(writing, "write_safetensors", half_written)
    with pytest.raises(interruption):
        save_pretrained(folder, MODEL, random_params(MODEL, seed=1))
    assert contents(folder) == before


def test_a_save_cut_short_among_shards_leaves_no_mixture(folder, monkeypatch):
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 2000)
    save_pretrained(folder, MODEL, PARAMS)
    replace = huggingface.pathlib.Path.replace

    def replace_but_the_third(path, target):
        if path.name.startswith("model-00003"):
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(huggingface.pathlib.Path, "replace", replace_but_the_third)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(folder, MODEL, random_params(MODEL, seed=1))
    with pytest.raises(InputError, match="holds neither"):
        load_pretrained(folder)


def test_weights_are_moved_into_place_last(tmp_path, monkeypatch):
    moved, replace = [], huggingface.pathlib.Path.replace
    monkeypatch.setattr(
        huggingface.pathlib.Path,
        "replace",
        lambda path, target: moved.append(path.name) or replace(path, target),
    )
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 4000)
    save_pretrained(tmp_path, MODEL, PARAMS, FolderTokenizer())
    assert moved == [
        "config.json",
        "generation_config.json",
        "chat.jinja",
        "tokenizer.json",
        *sorted(path.name for path in tmp_path.glob("*.safetensors")),
        "model.safetensors.index.json",
    ]


def test_a_full_disk_is_an_oserror(folder):
    before = contents(folder)
    # A limit on the size of files ends a write as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = len(before["model.safetensors"]) - 1
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            save_pretrained(folder, MODEL, PARAMS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(folder) == before


def test_folders_that_cannot_be_written(folder):
    with pytest.raises(OSError, match="config.json"):
        save_pretrained(folder / "config.json" / "below", MODEL, PARAMS)
    with pytest.raises(InputError, match="gs://bucket/model is an address"):
        save_pretrained("gs://bucket/model", MODEL, PARAMS)


def test_other_files_of_the_folder_stay(folder):
    (folder / "README.md").write_text("mine")
    save_pretrained(folder, MODEL, PARAMS)
    assert (folder / "README.md").read_text() == "mine"


def test_parameters_of_another_model_are_refused(tmp_path):
    other = GPT2(dataclasses.replace(CONFIG, n_layer=3))
    message = r"params\['layers'\].* must have shape \(3, 3, 8\), but has \(2, 3, 8\)"
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path, other, PARAMS)
    rest = {key: value for key, value in PARAMS.items() if key != "ln_f"}
    with pytest.raises(ValueError, match=r"params\['ln_f'\]\['bias'\] .* but has None"):
        save_pretrained(tmp_path, MODEL, rest)
    head = {**HEAD, "scale": jnp.zeros(())}
    with pytest.raises(ValueError, match=r"reward head .* but has \['kernel', 'scale'\]"):
        save_reward_model(tmp_path, MODEL, {"model": PARAMS, "head": head})
    assert not any(tmp_path.iterdir())


# Tokenizers


class FolderTokenizer:
    """A tokenizer with the one method that is called."""

    def save_pretrained(self, folder):
        path = huggingface.pathlib.Path(folder)
        (path / "tokenizer.json").write_text("{}")
        (path / "templates").mkdir()
        (path / "templates" / "chat.jinja").write_text("")


def test_the_tokenizer_is_written_too(folder):
    save_pretrained(folder, MODEL, PARAMS, FolderTokenizer())
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "templates" / "chat.jinja").exists()
    assert not list(folder.glob(".saving*"))
