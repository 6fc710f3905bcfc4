"""The device mesh of a configuration."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.partition import AXES


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `mesh` of a configuration: how many devices stand along each axis.

    Attributes:
      data: rows of a batch are split over it, parameters are replicated.
      fsdp: rows of a batch and parameters are both split over it.
      tensor: widths inside a layer are split over it.

    One of them may be -1: the rest of the devices.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(
                "mesh.data, mesh.fsdp and mesh.tensor must be positive, one of them may be -1 for "
                f"the rest of the devices, but they are {', '.join(map(str, sizes))}."
            )


def make_mesh(settings: Settings, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices, with `AxisType.Auto`.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [settings.data, settings.fsdp, settings.tensor]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh data x fsdp x tensor = {' x '.join(map(str, sizes))} does not fit "
            f"{len(devices)} devices; let them multiply to that, or set one to -1."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
