"""Model FLOPs utilization: the FLOP/s of a run over the peak of its devices."""

import jax

# Dense bfloat16 FLOP/s of one device, by prefix of JAX's `device_kind`; the vendors' figures.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def utilization(
    flops_per_token: float, tokens_per_second: float, devices: list[jax.Device] | None = None
) -> float | None:
    """flops_per_token * tokens_per_second over the peak of all devices; None on unknown devices.

    FLOPs are those of the products with parameters, 2 per parameter and token forwards and 4 more
    backwards; attention and recomputation are left out (Chowdhery et al. 2022, PaLM, appendix B).

    >>> utilization(6.0, 1.0, jax.devices("cpu")) is None
    True
    """
    devices = jax.devices() if devices is None else devices
    kind = devices[0].device_kind
    peak = next((flops for name, flops in PEAK_FLOPS.items() if kind.startswith(name)), None)
    if peak is None:
        return None
    return flops_per_token * tokens_per_second / (peak * len(devices))
