"""Settings of the device mesh and of several processes, without an import of JAX."""

import dataclasses

from rlhf_jax.checks import PositiveInt, check_fields
from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The section `mesh`: the number of devices along each axis.

    Attributes:
      data: the batch is split over it, parameters are replicated.
      fsdp: the batch and parameters are both split over it.
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


@dataclasses.dataclass(frozen=True)
class DistributedSettings:
    """The section `distributed`: the processes that train together.

    A single process needs none of it. The processes of a Cloud TPU slice, of an `srun` and of an
    `mpirun` find each other; elsewhere each needs the first three.

    Attributes:
      coordinator: "host:port" of process 0, as the others reach it; the port is any free one.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      local_device_ids: the GPUs of this process; empty: all, or one each where SLURM or Open MPI
        started several processes on this machine.
      auto: whether processes on a cluster find each other; with false each one runs alone.
      timeout: seconds to wait for the others at the start.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] = ()
    auto: bool = True
    timeout: PositiveInt = 300

    def __post_init__(self) -> None:
        check_fields("distributed", self)
        values = (self.coordinator, self.num_processes, self.process_id)
        if any(x is None for x in values) and any(x is not None for x in values):
            raise InputError(
                "distributed.coordinator, distributed.num_processes and distributed.process_id "
                f"belong together, but are {values[0]}, {values[1]} and {values[2]}; give all "
                "three, or none on a cluster or with a single process."
            )
        if self.coordinator is not None:
            self._check_address(self.coordinator)
        count, index = self.num_processes, self.process_id
        if count is not None and index is not None and not 0 <= index < count:
            raise InputError(
                "distributed.num_processes must be at least 1 and distributed.process_id from 0 to "
                f"one less than that, but they are {count} and {index}."
            )
        if any(number < 0 for number in self.local_device_ids):
            raise InputError(
                "distributed.local_device_ids must be from 0 on, but are "
                f"{list(self.local_device_ids)}."
            )

    @staticmethod
    def _check_address(address: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(
                "distributed.coordinator must be host:port, such as 10.0.0.2:8476, but is "
                f"{address!r}."
            )
