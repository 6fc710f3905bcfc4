"""The device mesh of a configuration."""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
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

    Devices that are close to each other are close on the mesh, the last axes first. Several slices
    of TPUs, between which there is the network of the data centre alone, stand along data.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or slices would have to share
        an axis other than data.
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
    return Mesh(arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def arranged(sizes: list[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices in an array of these sizes."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, fsdp, tensor = sizes
    if data % slices:
        raise InputError(
            f"mesh.data = {data} is not divisible by the {slices} slices of TPUs; let each slice "
            "have its part of it."
        )
    if slices > 1:
        within, across = (data // slices, fsdp, tensor), (slices, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # an axis is only a part of one of the slice's own, say 4 of 16
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
