"""Published peaks of TPU chips, and the least time that they allow; nothing here imports jax."""

from typing import NamedTuple

TOPOLOGIES = (
    "v5e:4x4 or v6e:16x16 (chips of a slice in two dimensions), v5p:4x4x8 (in three), local (the "
    "devices of this machine) or cpu:8 (this number of devices on its CPU)"
)


class Chip(NamedTuple):
    """Published peaks of one chip.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      hbm: bytes of memory.
      hbm_bandwidth: bytes/s that are read or written.
      ici_bandwidth: bytes/s over all links to other chips, both directions together.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float


# Of https://docs.cloud.google.com/tpu/docs/v5e, v5p and v6e; their GB of memory are GiB.
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 400e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9),
    "v6e": Chip(918e12, 32 * 2**30, 1600e9, 800e9),
}


def least_seconds(chip: Chip, *, flops: float, moved: float, received: float) -> dict[str, float]:
    """Lower bounds on the time of a program, of which the greatest holds.

        flops / peak FLOP/s, moved / HBM bytes/s, received / (ICI bytes/s / 2)

    A chip receives over one direction of its links.

    Args:
      flops: of one device.
      moved: bytes that it reads and writes in its memory.
      received: bytes that it receives from others.

    Williams et al. 2009, Roofline: an insightful visual performance model.

    >>> least_seconds(CHIPS["v5e"], flops=197e12, moved=819e9, received=100e9)
    {'compute': 1.0, 'memory': 1.0, 'network': 0.5}
    """
    return {
        "compute": flops / chip.flops,
        "memory": moved / chip.hbm_bandwidth,
        "network": received / (chip.ici_bandwidth / 2),
    }
