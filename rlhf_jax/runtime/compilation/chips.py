"""What chips can do, by their makers' pages."""

from typing import NamedTuple

from rlhf_jax.runtime.run.utilization import PEAK_FLOPS


class Chip(NamedTuple):
    """Published peaks of one chip.

    Attributes:
      name: as topologies name it.
      flops: dense bfloat16 FLOP/s.
      hbm: bytes of memory.
      hbm_bandwidth: bytes/s that are read or written.
      ici_bandwidth: bytes/s over all links to other chips, both directions together.
      source: the page that says so.
    """

    name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float
    source: str

    @property
    def receives(self) -> float:
        """Bytes/s that a chip receives at most: one direction of all its links."""
        return self.ici_bandwidth / 2


# The pages give the memory in GB where the chip has GiB, as libtpu says.
CHIPS = {
    "v5e": Chip(
        "v5e",
        PEAK_FLOPS["TPU v5e"],
        16 * 2**30,
        819e9,
        400e9,
        "https://docs.cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        "v5p",
        PEAK_FLOPS["TPU v5p"],
        95 * 2**30,
        2765e9,
        1200e9,
        "https://docs.cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        "v6e",
        PEAK_FLOPS["TPU v6e"],
        32 * 2**30,
        1600e9,
        800e9,
        "https://docs.cloud.google.com/tpu/docs/v6e",
    ),
}


class Roofline(NamedTuple):
    """The seconds that a program takes at least, by each of the peaks."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """What the program takes at least, all three overlapping perfectly."""
        return max(self)

    @property
    def bound(self) -> str:
        """Which of the three that is."""
        return self._fields[self.index(self.seconds)]


def roofline(chip: Chip, *, flops: float, moved: float, received: float) -> Roofline:
    """Lower bounds on the time of a program.

        max(flops / peak FLOP/s, moved / HBM bytes/s, received / (ICI bytes/s / 2))

    Args:
      flops: of one device.
      moved: bytes that it reads and writes in its memory.
      received: bytes that it receives from others.

    Williams et al. 2009, Roofline: an insightful visual performance model.

    >>> roofline(CHIPS["v5e"], flops=197e12, moved=1e9, received=1e9).bound
    'compute'
    """
    return Roofline(flops / chip.flops, moved / chip.hbm_bandwidth, received / chip.receives)
