"""Folders read by eight CPU devices, each its own part, and written from them; and attention.

Started by test_streaming.py, with an empty folder, in a process of its own: the number of devices
is fixed at start.
"""

import os

if __name__ == "__main__":  # and not when it is looked through for doctests
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import dataclasses
import functools
import json
import operator
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from rlhf_jax.batches import TextBatch
from rlhf_jax.models import huggingface, reading, readout
from rlhf_jax.models.decoder_readers import read_config
from rlhf_jax.models.huggingface import (
    fresh_model,
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from rlhf_jax.models.settings import ModelSettings
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import tree_shardings
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.rollout import generate
from rlhf_jax.training import sft
from tests.models import tiny_family
from tests.models.gpt2_folders import HEAD, MODEL, PARAMS
from tests.models.split_kernel import check_split

READ = []  # bytes of each piece of a file that was read


def read(tensor, index, plain=reading.TensorFile.read):
    """The same, and its size is noted."""
    part = plain(tensor, index)
    READ.append(part.nbytes)
    return part


def assert_same(params, expected):
    """Equal parameters."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y), params, expected)


def main(base):
    """Reads and writes both kinds of model on two meshes, leaf by leaf and layer by layer."""
    folder = Path(base)
    save_pretrained(folder / "model", MODEL, PARAMS)
    save_reward_model(folder / "reward", MODEL, {"model": PARAMS, "head": HEAD})
    reading.TensorFile.read = read
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    for sizes, part_bytes in (((1, 8, 1), 2**28), ((2, 2, 2), 1)):
        reading.PART_BYTES = part_bytes
        mesh = make_mesh(MeshSettings(*sizes))
        jax.set_mesh(mesh)  # as stages do while they load and export
        READ.clear()
        _, params = load_pretrained(folder / "model", mesh=mesh)
        assert_same(params, PARAMS)
        shardings = tree_shardings(mesh, PARAMS, MODEL.partition_rules)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
        layer = PARAMS["layers"]["attn"]["c_attn"]["kernel"][0].nbytes
        assert max(READ) <= layer, (max(READ), layer)
        # A split array is read once in all, and a replicated one once for all devices.
        assert sum(READ) <= total, (sum(READ), total)
        save_pretrained(folder / "model_again", MODEL, params)
        _, reward = load_reward_model(folder / "reward", mesh=mesh)
        assert_same(reward, {"model": PARAMS, "head": HEAD})
        save_reward_model(folder / "reward_again", MODEL, reward)
        for name in ("model", "reward"):
            old, new = (folder / each / "model.safetensors" for each in (name, f"{name}_again"))
            assert old.read_bytes() == new.read_bytes(), (sizes, name)
    check_split()
    huggingface.FAMILIES = (*huggingface.FAMILIES, tiny_family.FAMILY)
    check_family(folder / "tiny", tiny_family.Tiny(tiny_family.TinyConfig()), ("k", "kernel"))
    sizes = ModelSettings(n_layer=2, n_embd=16, n_head=4, n_positions=16, dropout=0.0)
    for name in ("olmo2", "phi3", "gemma2"):  # norms of full projections, fused ones, two kinds
        model = fresh_model(sizes, vocab_size=11, model_type=name)
        if name == "gemma2":
            data = {**json.loads(model.config.source), "sliding_window": 3}
            model = dataclasses.replace(model, config=read_config(data))
        leaf = ("qkv_proj" if name == "phi3" else "k_proj", "kernel")
        check_family(folder / name, model, ("self_attn", *leaf), is_linear=name == "gemma2")


def check_family(folder, model, leaf, is_linear=False):
    """A step of a family on a mesh equals one device, from a folder to a folder.

    With `is_linear` the mesh makes no array of all logits, and one device does.
    """
    save_pretrained(folder / "base", model, model.init(jax.random.key(1)))
    settings = sft.Settings(batch_size=8, dropout=False)
    optimizer = optax.sgd(0.1)  # Adam would scale up the rounding of gradients that are zero
    tokens = np.random.default_rng(0).integers(1, 11, (8, 6)).astype(np.int32)
    batch = TextBatch(tokens, tokens // tokens, tokens > 0)
    prompts = (tokens, tokens > 0)

    def train(mesh, params):
        key = jax.random.key(0)
        state = sft.init_state(model, params, settings, key, optimizer=optimizer)
        state = jax.device_put(state, tree_shardings(mesh, state, model.partition_rules))
        state, metrics = jax.jit(sft.make_step(model, settings, optimizer=optimizer))(
            state, batch, key
        )
        sample = functools.partial(generate, model, max_new_tokens=4)
        return state.params, metrics["train/loss"], jax.jit(sample)(state.params, *prompts, key)

    one = make_mesh(MeshSettings(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(one):
        expected = train(one, load_pretrained(folder / "base", mesh=one)[1])
    readout.LINEAR_VOCABULARY = 1 if is_linear else 100
    mesh = make_mesh(MeshSettings(2, 2, 2))
    with jax.set_mesh(mesh):
        _, params = load_pretrained(folder / "base", mesh=mesh)
        kernel = functools.reduce(operator.getitem, leaf, params["layers"])
        layers, rows, columns = kernel.shape
        shape = (layers, rows // 2, columns // 2)
        assert {shard.data.shape for shard in kernel.addressable_shards} == {shape}
        actual = train(mesh, params)
        save_pretrained(folder / "trained", model, actual[0])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected
    )
    assert_same(load_pretrained(folder / "trained")[1], jax.device_get(actual[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
