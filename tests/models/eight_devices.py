"""Folders read by eight CPU devices, each its own part, and written from them; and attention.

Started by test_streaming.py, with an empty folder, in a process of its own: the number of devices
is fixed at start.
"""

import os

if __name__ == "__main__":  # and not when it is looked through for doctests
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import sys
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.models import reading
from rlhf_jax.models.huggingface import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import tree_shardings
from rlhf_jax.parallel.settings import MeshSettings
from tests.models.split_kernel import check_split
from tests.models.test_huggingface import HEAD, MODEL, PARAMS

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
    """Reads and writes both kinds of model on two meshes, by whole leaves and by layers."""
    folder = Path(base)
    save_pretrained(folder / "model", MODEL, PARAMS)
    save_reward_model(folder / "reward", MODEL, {"model": PARAMS, "head": HEAD})
    reading.TensorFile.read = read
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
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
        # What is split is read once in all, and what is replicated once for all devices.
        assert sum(READ) <= whole, (sum(READ), whole)
        save_pretrained(folder / "model_again", MODEL, params)
        _, reward = load_reward_model(folder / "reward", mesh=mesh)
        assert_same(reward, {"model": PARAMS, "head": HEAD})
        save_reward_model(folder / "reward_again", MODEL, reward)
        for name in ("model", "reward"):
            old, new = (folder / each / "model.safetensors" for each in (name, f"{name}_again"))
            assert old.read_bytes() == new.read_bytes(), (sizes, name)
    check_split()


if __name__ == "__main__":
    main(*sys.argv[1:])
