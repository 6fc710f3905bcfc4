"""Devices by the name of their topology; those of a TPU slice need not exist."""

import contextlib
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.compilation import TOPOLOGIES

# Otherwise libtpu queries the cloud for the slice, for minutes, and prints that there is none; and
# only one process may use it.
_WITHOUT_CLOUD = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


def find_devices(name: str) -> list[jax.Device]:
    """The devices of a topology; before any other use of JAX.

    Only for `local` are accelerators of this machine used.

    Raises:
      InputError: the name is unknown, there are too few devices here, or libtpu is missing.
    """
    if name == "local":
        return jax.devices()
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    if count := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return _cpu_devices(int(count[1]))
    if not re.fullmatch(r"v\d+[a-z]*:[1-9]\d*(x[1-9]\d*){1,2}", name):
        raise InputError(f"--topology {name!r} is not known; give {TOPOLOGIES}.")
    return _tpu_devices(name)


def _cpu_devices(count: int) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # JAX has been used, and has its devices
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--topology cpu:{count} needs {count} devices, but JAX has {len(devices)} on this "
            f"CPU; set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return devices[:count]


def _tpu_devices(name: str) -> list[jax.Device]:
    for variable, value in _WITHOUT_CLOUD.items():
        os.environ.setdefault(variable, value)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name} needs libtpu, the compiler for TPUs; install the extra: "
            "pip install 'rlhf-jax[tpu]'."
        )
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--topology {name} is no slice of TPUs ({reason}); give {TOPOLOGIES}."
        ) from None
