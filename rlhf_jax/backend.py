"""What is known, while a program is traced, of the devices that it is to run on."""

import jax


def is_on_cpu() -> bool:
    """Whether what is traced is to run on CPUs: the devices of the mesh, if one is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "cpu"
    device = mesh.abstract_device  # None where it is not known yet
    return device is not None and device.device_kind == "cpu"


def is_on_one_cpu() -> bool:
    """The same, of a single one."""
    mesh = jax.sharding.get_abstract_mesh()
    return is_on_cpu() and (mesh.empty or mesh.size == 1)
