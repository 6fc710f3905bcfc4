"""The device mesh."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.partition import AXES
from rlhf_jax.parallel.settings import MeshSettings


def make_mesh(settings: MeshSettings, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices, with `AxisType.Auto`.

    Devices that are close to each other are close on the mesh, the last axes first. Several slices
    of TPUs, connected by the network of the data centre, lie along data.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or slices would have to share
        an axis other than data.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [settings.data, settings.fsdp, settings.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
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
        shapes = (data // slices, fsdp, tensor), (slices, 1, 1)  # within slices, and across
        return mesh_utils.create_hybrid_device_mesh(
            *shapes, devices, allow_split_physical_axes=True
        )
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # an axis is only a part of one of the slice's own, say 4 of 16
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
