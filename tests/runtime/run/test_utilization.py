import types

import pytest

from rlhf_jax.runtime.run.progress import utilization


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("TPU v5 lite", 197e12)],
)
def test_utilization_is_the_share_of_the_peak_of_all_devices(kind, peak):
    devices = [types.SimpleNamespace(device_kind=kind)] * 4
    assert utilization(1e9, 1e5, devices) == pytest.approx(1e14 / (4 * peak))


def test_unknown_devices_have_no_utilization():
    assert utilization(1e9, 1e5, [types.SimpleNamespace(device_kind="abacus")]) is None
