"""Parameters come from files and go to files a part at a time, wherever they are."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load

from rlhf_jax.errors import InputError
from rlhf_jax.models import reading, writing
from rlhf_jax.models.huggingface import (
    check_pretrained,
    check_reward_model,
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from tests.models.gpt2_folders import HEAD, MODEL, PARAMS, adding, assert_equal, edit_tensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streaming")
    save_pretrained(folder / "model", MODEL, PARAMS)
    save_reward_model(folder / "reward", MODEL, {"model": PARAMS, "head": HEAD})
    return folder


@pytest.mark.newest
def test_eight_devices_read_their_parts_and_are_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.eight_devices", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def sizes_in_host_memory(monkeypatch):
    """A list of how many bytes are made on the host for devices, filled as they are."""
    sizes, read_part = [], reading._read_part

    def read(*arguments):
        part = read_part(*arguments)
        sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(reading, "_read_part", read)
    return sizes


@pytest.mark.parametrize("part_bytes", [1, 1600, 2**28])
def test_a_large_stack_is_read_by_layers(folder, monkeypatch, part_bytes):
    """One index of an unstacked leaf, or a layer of a stack, whatever the bound."""
    sizes = sizes_in_host_memory(monkeypatch)
    monkeypatch.setattr(reading, "PART_BYTES", part_bytes)
    _, params = load_pretrained(folder / "model")
    assert_equal(params, PARAMS)
    assert {leaf.committed for leaf in jax.tree.leaves(params)} == {False}
    layer = PARAMS["layers"]["attn"]["c_attn"]["kernel"][0].nbytes
    assert max(sizes) <= max(part_bytes, layer)
    assert sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    _, reward = load_reward_model(folder / "reward")
    assert_equal(reward, {"model": PARAMS, "head": HEAD})


def test_loaded_parameters_can_be_donated(folder, monkeypatch):
    for part_bytes in (1, 2**28):
        monkeypatch.setattr(reading, "PART_BYTES", part_bytes)
        _, params = load_pretrained(folder / "model")
        jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_tied_heads_are_compared_in_parts(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(reading, "PART_BYTES", 100)  # three of eleven vectors
    save_pretrained(tmp_path, MODEL, PARAMS)
    table = np.asarray(PARAMS["wte"]["embedding"])[:11]
    edit_tensors(tmp_path, adding("lm_head.weight", table))
    assert_equal(load_pretrained(tmp_path)[1], PARAMS)
    edit_tensors(
        tmp_path, adding("lm_head.weight", np.where(np.arange(11)[:, None] < 10, table, 0))
    )
    with pytest.raises(InputError, match="'lm_head.weight' differs from"):
        load_pretrained(tmp_path)


def test_folders_are_checked_without_being_read(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(reading.TensorFile, "read", None)
    assert check_pretrained(folder / "model") == MODEL
    assert check_reward_model(folder / "reward").config.vocab_size == MODEL.config.vocab_size + 1
    with pytest.raises(InputError, match="so it is no reward model"):
        check_reward_model(folder / "model")


def test_one_tensor_at_a_time_is_written(tmp_path):
    """A tensor is released before the next one is gathered."""
    sizes = {"a": (3, 2), "b": (4,), "c": (2, 2)}
    shapes = {name: jax.ShapeDtypeStruct(size, np.float32) for name, size in sizes.items()}
    last = []

    def tensors():
        for count, shape in enumerate(sizes.values()):
            assert not last or last[0]() is None
            array = np.full(shape, count, np.float32)
            last[:] = [weakref.ref(array)]
            yield array[:1] if count == 2 else array  # zeros stand for the missing vector
            del array

    writing.write_safetensors(tmp_path / "file", shapes, tensors())
    arrays = load((tmp_path / "file").read_bytes())
    assert {name: array.shape for name, array in arrays.items()} == sizes
    np.testing.assert_array_equal(arrays["c"], [[2, 2], [0, 0]])


@pytest.fixture
def two_hosts(monkeypatch):
    """A function that makes this process one of two hosts, the first of which has this failure."""

    def begin(index, failure=None):
        def from_first(function, own):
            return function(own if index == 0 else failure)

        monkeypatch.setattr(writing.hosts, "is_first", lambda: index == 0)
        monkeypatch.setattr(writing.hosts, "from_first", from_first)

    return begin


def fails_after_one(tensors):
    next(tensors)
    raise OSError("no space left")


def test_a_host_that_cannot_write_still_gathers(two_hosts):
    two_hosts(index=0)
    tensors = iter(range(3))
    with pytest.raises(OSError, match="no space left"):
        writing.write_on_first_host(fails_after_one, tensors)
    assert not list(tensors)
    writing.write_on_first_host(list, iter(range(3)))


@pytest.mark.parametrize("failure", [None, OSError("no space left")])
def test_other_hosts_gather_and_do_not_write(two_hosts, failure):
    two_hosts(index=1, failure=failure)
    tensors = iter(range(3))
    if failure is None:
        writing.write_on_first_host(pytest.fail, tensors)
    else:
        with pytest.raises(OSError, match="no space left"):
            writing.write_on_first_host(pytest.fail, tensors)
    assert not list(tensors)
