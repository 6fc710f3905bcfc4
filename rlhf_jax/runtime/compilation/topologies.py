"""Devices by the name of their topology; those of a TPU slice need not exist."""

import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental import topologies

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.compilation.chips import CHIPS, TOPOLOGIES, Chip


class Topology(NamedTuple):
    """Devices to compile for; `chip` is None unless they are those of a TPU slice."""

    name: str
    devices: list[jax.Device]
    chip: Chip | None


def find_topology(name: str) -> Topology:
    """The devices of a topology; before any other use of JAX.

    Only for `local` are accelerators of this machine used.

    Raises:
      InputError: the name is unknown, there are too few devices here, or libtpu is missing.
    """
    if name == "local":
        return Topology(name, jax.devices(), None)
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    if count := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Topology(name, _cpu_devices(int(count[1])), None)
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", sizes):
        raise InputError(f"--topology {name!r} is not known; give {TOPOLOGIES}.")
    return Topology(name, _tpu_devices(name), CHIPS[kind])


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
    # Otherwise libtpu asks the cloud for the slice, for minutes, and only one process may use it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name} needs libtpu, the compiler for TPUs; install the extra: "
            "pip install 'rlhf-jax[tpu]'."
        )
    try:
        with captured_stderr():
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--topology {name} is no slice of TPUs ({reason}); give {TOPOLOGIES}."
        ) from None


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Yields a list that at the end holds the lines that libtpu wrote to standard error."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        try:
            os.dup2(log.fileno(), 2)
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            lines += log.read().decode(errors="replace").splitlines()
