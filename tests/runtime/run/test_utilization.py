import types

import jax
import pytest

from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.runtime.run.utilization import multiplied_parameters, utilization


def test_gpt2_small_multiplies_each_token_with_its_matrices():
    model = GPT2(GPT2Config())
    params = jax.eval_shape(model.init, jax.random.key(0))
    layers = 12 * (768 * 3 * 768 + 768 * 768 + 2 * 4 * 768 * 768)
    assert multiplied_parameters(params, unembeds=True) == layers + 50304 * 768
    assert multiplied_parameters({"model": params}, unembeds=False) == layers


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("TPU v5 lite", 197e12)],
)
def test_utilization_is_the_share_of_the_peak_of_all_devices(kind, peak):
    devices = [types.SimpleNamespace(device_kind=kind)] * 4
    assert utilization(1e9, 1e5, devices) == pytest.approx(1e14 / (4 * peak))


def test_unknown_devices_have_no_utilization():
    assert utilization(1e9, 1e5, [types.SimpleNamespace(device_kind="abacus")]) is None
