"""The cost of a step against counts by hand."""

import importlib.util
import sys

import jax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.compilation import cost, topologies
from rlhf_jax.runtime.config import SFTConfig, resolve

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
WIDTH, LENGTH, VOCABULARY = 64, 32, 256  # the vocabulary is padded


def sft_config(**sections):
    sft = {"batch_size": 16, "eval_batch_size": 16, "dropout": False}
    return resolve(SFTConfig, {"sft": sft, "data": {"max_length": LENGTH}, **sections})


@pytest.mark.newest
def test_the_numbers_of_a_step_are_those_of_a_count_by_hand(config_folder):
    config = sft_config(model={"remat": "none"})
    costs = cost.stage_cost(config, "local", model_name=config_folder)
    (step,) = costs["programs"]
    layer = 12 * WIDTH**2 + 13 * WIDTH
    parameters = layer + (VOCABULARY + LENGTH) * WIDTH + 2 * WIDTH
    assert costs["parameters"] == parameters
    batch = 16 * LENGTH * (4 + 4 + 1)
    state = 3 * 4 * parameters  # and the two moments of Adam
    assert step["arguments"] == pytest.approx(state + batch, rel=1e-3)
    assert step["outputs"] == pytest.approx(state, rel=1e-3)
    assert step["peak"] == pytest.approx(step["arguments"] + step["temporaries"], rel=1e-3)
    tokens = 16 * LENGTH
    products = 3 * 2 * (tokens * 12 * WIDTH**2 + 16 * (LENGTH - 1) * VOCABULARY * WIDTH)
    biases = 2 * tokens * 9 * WIDTH  # their gradients, on one CPU products with ones
    attention = 7 * 2 * tokens * LENGTH * WIDTH
    assert step["flops"] == products + biases + attention
    assert (step["fits"], costs["dtype"]) == (True, "float32")
    assert "seconds" not in step


@pytest.mark.newest
def test_a_fresh_model_is_of_the_family_in_the_settings():
    config = sft_config(model={"family": "qwen3", "n_layer": 1, "n_embd": 64, "n_positions": 32})
    costs = cost.stage_cost(config, "local")
    hidden = -(-8 * 64 // 3 // 8) * 8
    matrices = 4 * 64**2 + 3 * 64 * hidden
    vocabulary = -(-config.tokenizer.vocab_size // 128) * 128
    assert (
        costs["parameters"] == matrices + vocabulary * 64 + 3 * 64 + 2 * 16
    )  # norms, also of heads
    tokens = 16 * LENGTH
    products = 3 * 2 * (tokens * matrices + 16 * (LENGTH - 1) * vocabulary * 64)
    assert costs["programs"][0]["flops"] == products + 7 * 2 * tokens * LENGTH * 64


@pytest.mark.newest
def test_recomputation_counts_again():
    """A forward pass is a third of a step, except for the logits, which are not recomputed."""
    flops = {}
    for remat in ("none", "full"):
        sizes = {"n_layer": 4, "n_head": 2, "n_embd": 64, "n_positions": 16, "remat": remat}
        config = sft_config(model=sizes, tokenizer={"vocab_size": 258}, data={"max_length": 16})
        costs = cost.stage_cost(config, "local")
        flops[remat] = costs["programs"][0]["flops"]
    assert 1.2 < flops["full"] / flops["none"] < 1.34


def test_exhausted_memory_has_both_sizes():
    known = "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for "
    known += "HLO temporaries (47.00G) exceeds available HBM (15.75G). HLO module: jit_step."
    sizes = {"needed": "47.00G", "available": "15.75G"}
    assert cost._memory_sizes(RuntimeError(known)) == sizes
    other = cost._memory_sizes(RuntimeError("RESOURCE_EXHAUSTED: something else"))
    assert other == {"needed": "more", "available": "there is"}
    with pytest.raises(RuntimeError, match="INTERNAL"):
        cost._memory_sizes(RuntimeError("INTERNAL: no"))
    numbers = {
        **dict.fromkeys(("stage", "model", "dtype", "topology", "device_kind"), "x"),
        "parameters": 1,
        "devices": 1,
        "mesh": {"data": 1},
        "programs": [{"name": "step", "fits": False, "flops": 1e9, **sizes}],
    }
    text = cost.as_text(numbers)
    assert "does not fit. The compiler needs 47.00G bytes of memory, and has 15.75G." in text


def test_a_slice_needs_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match=r"needs libtpu.*pip install 'rlhf-jax\[tpu\]'"):
        topologies.find_devices("v5e:4x4")


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu, of the extra tpu, is not installed")
@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 4, 2)])
def test_steps_are_compiled_for_sixteen_chips(config_folder, sizes):
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    costs = cost.stage_cost(sft_config(mesh=mesh), "v5e:4x4", model_name=config_folder)
    (step,) = costs["programs"]
    state = 3 * 4 * costs["parameters"] / (sizes[1] * sizes[2])
    assert state < step["arguments"] < 2 * state + 2**16  # vectors are replicated, chips pad
    assert step["seconds"] == pytest.approx(step["flops"] / 197e12)
    assert step["fits"]
    assert step["peak"] < 2**26
    assert "at least" in cost.as_text(costs)
    with pytest.raises(InputError, match="v5e:3x5 is no slice of TPUs"):
        topologies.find_devices("v5e:3x5")


def test_a_cpu_topology_has_the_number_of_devices():
    assert topologies.find_devices("cpu:1") == jax.devices("cpu")[:1]
