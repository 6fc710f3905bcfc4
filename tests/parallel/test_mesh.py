"""The mesh of a configuration, and where arrays stand on it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlhf_jax.errors import InputError
from rlhf_jax.models.gpt2 import GPT2, PARTITION_RULES, GPT2Config
from rlhf_jax.parallel.mesh import arranged, make_mesh
from rlhf_jax.parallel.partition import (
    check_batch_size,
    partition_spec,
    tree_shardings,
)
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.training import ppo, reward, sft


class Mesh:
    """As much of a mesh as the checks read."""

    def __init__(self, **shape):
        self.shape = shape


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(InputError, match="one of them may be -1 for the rest of the devices, but"):
        MeshSettings(*sizes)


def test_the_mesh_takes_all_devices_and_leaves_the_spreading_to_the_compiler():
    mesh = make_mesh(MeshSettings())
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            MeshSettings(2, 1, 1),
            "mesh data x fsdp x tensor = 2 x 1 x 1 does not fit 1 devices; let",
        ),
        (
            MeshSettings(-1, 3, 1),
            "mesh data x fsdp x tensor = -1 x 3 x 1 does not fit 1 devices; let",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_named(settings, message):
    with pytest.raises(InputError) as error:
        make_mesh(settings, jax.devices()[:1])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("params/wte/embedding", PartitionSpec("tensor", "fsdp")),
        ("params/model/wpe/embedding", PartitionSpec(None, "fsdp")),
        ("params/layers/attn/c_attn/kernel", PartitionSpec(None, "fsdp", None, "tensor")),
        ("frozen/ref/layers/mlp/c_fc/kernel", PartitionSpec(None, "fsdp", "tensor")),
        ("params/layers/attn/c_proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
        ("params/layers/mlp/c_proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
        ("params/layers/attn/c_attn/bias", PartitionSpec(None, None, "tensor")),
        ("params/layers/mlp/c_fc/bias", PartitionSpec(None, "tensor")),
        ("params/layers/mlp/c_proj/bias", PartitionSpec()),
        ("params/layers/ln_1/scale", PartitionSpec()),
        ("params/ln_f/bias", PartitionSpec()),
        ("params/value_head/kernel", PartitionSpec()),
        ("kl_coef", PartitionSpec()),
        ("penalty_coef", PartitionSpec()),
        ("score_stats/num_scores", PartitionSpec()),
        ("score_stats/mean", PartitionSpec()),
        ("score_stats/m2", PartitionSpec()),
        ("opt_state/1/0/mu/layers/attn/c_attn/kernel", PartitionSpec(None, "fsdp", None, "tensor")),
        ("opt_state/1/0/count", PartitionSpec()),
    ],
)
def test_the_spec_of_a_parameter(path, spec):
    ndim = max(len(spec), 2 if "layers" in path else 1)
    assert partition_spec(path, ndim, PARTITION_RULES) == spec


def test_a_matrix_without_a_rule_is_an_error():
    message = r"no partition rule covers 'params/lora/kernel', an array of 2 axes; add one"
    with pytest.raises(ValueError, match=message):
        partition_spec("params/lora/kernel", 2, PARTITION_RULES)
    tree = {"params": {"lora": {"kernel": jnp.zeros((4, 4))}}}
    with pytest.raises(ValueError, match=message):
        tree_shardings(Mesh(data=1, fsdp=2, tensor=1), tree, PARTITION_RULES)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors_and_scalars_without_a_rule_are_replicated(shape):
    mesh = make_mesh(MeshSettings(1, 1, 1), jax.devices()[:1])
    shardings = tree_shardings(mesh, {"anything": jnp.zeros(shape)}, PARTITION_RULES)
    assert shardings["anything"].spec == PartitionSpec()


def test_heads_that_the_mesh_does_not_divide_are_an_error():
    model = GPT2(GPT2Config(vocab_size=300, n_positions=16, n_embd=12, n_layer=2, n_head=3))
    model.check_mesh(Mesh(data=2, fsdp=2, tensor=3))
    with pytest.raises(InputError) as error:
        model.check_mesh(Mesh(data=2, fsdp=1, tensor=2))
    assert str(error.value) == (
        "The model has n_head = 3 heads of attention, which are not divisible by mesh.tensor = 2; "
        "choose a tensor that divides them, or use fsdp instead."
    )


@pytest.mark.parametrize("stage", [sft, reward, ppo])
def test_every_array_of_every_state_has_a_place(stage):
    model = GPT2(GPT2Config(vocab_size=300, n_positions=16, n_embd=8, n_layer=2, n_head=2))

    def init(key):
        params = model.init(key)
        rewards = {"reward_params": {"model": params, "head": {"kernel": jnp.zeros(8)}}}
        extra = rewards if stage is ppo else {}
        options = {"scale_reward": "running", "surrogate": "kl_penalty"} if stage is ppo else {}
        return stage.init_state(model, params, stage.Settings(**options), key, **extra)

    state = jax.eval_shape(init, jax.random.key(0))
    mesh = make_mesh(MeshSettings(1, 1, 1), jax.devices()[:1])
    shardings = tree_shardings(mesh, state, model.partition_rules)
    # An optimizer's moments stand where their parameters do.
    moments = shardings.opt_state[1][0].mu
    assert jax.tree.leaves(moments) == jax.tree.leaves(shardings.params)


def test_a_size_that_does_not_divide_names_the_axis_and_the_sizes():
    tree = {"layers": {"mlp": {"c_fc": {"kernel": jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)}}}}
    with pytest.raises(InputError) as error:
        tree_shardings(Mesh(data=1, fsdp=4, tensor=2), tree, PARTITION_RULES)
    assert str(error.value) == (
        "layers/mlp/c_fc/kernel has shape (2, 6, 8), of which 6 is not divisible by mesh.fsdp = 4; "
        "choose a fsdp that divides it."
    )


def test_a_batch_that_does_not_divide_names_the_setting():
    check_batch_size(Mesh(data=2, fsdp=2), "sft.batch_size", 8)
    with pytest.raises(InputError) as error:
        check_batch_size(Mesh(data=2, fsdp=2), "sft.batch_size", 6)
    assert str(error.value) == (
        "sft.batch_size = 6 is not divisible by mesh data x fsdp = 4 devices."
    )


class Device:
    """As much of a device of a slice of TPUs as its place on the mesh hangs on."""

    platform, device_kind, process_index = "cpu", "cpu", 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index


def test_slices_stand_along_data():
    devices = [Device(number, number % 2) for number in range(16)]
    placed = arranged([4, 2, 2], devices)
    assert placed.shape == (4, 2, 2)
    assert [{device.slice_index for device in part.flat} for part in placed] == [{0}, {0}, {1}, {1}]
    with pytest.raises(InputError) as error:
        arranged([1, 8, 2], devices)
    assert str(error.value) == (
        "mesh.data = 1 is not divisible by the 2 slices of TPUs; let each slice have its part of "
        "it."
    )
