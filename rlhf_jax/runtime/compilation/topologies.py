"""Devices by the name of their slice, there or not."""

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
from rlhf_jax.runtime.compilation.chips import CHIPS, Chip

KNOWN = (
    "v5e:4x4 or v6e:16x16 (chips of a slice in two dimensions), v5p:4x4x8 (in three), local (this "
    "machine's devices) or cpu:8 (so many devices on its CPU)"
)


class Topology(NamedTuple):
    """Devices to compile for; `chip` is None where no peaks are known."""

    name: str
    devices: list[jax.Device]
    chip: Chip | None

    @property
    def is_tpu(self) -> bool:
        """Whether it is a slice of TPUs that need not be there."""
        return self.chip is not None


def find_topology(name: str) -> Topology:
    """The devices of a topology; those of a TPU slice are there for the compiler alone.

    Raises:
      InputError: the name says nothing, there are too few devices here, or libtpu is missing.
    """
    if name == "local":
        return Topology(name, jax.devices(), None)
    if found := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Topology(name, _cpu_devices(int(found[1])), None)
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", sizes):
        raise InputError(f"--topology {name!r} is not known; give {KNOWN}.")
    return Topology(name, _tpu_devices(name), CHIPS[kind])


def _cpu_devices(count: int) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--topology cpu:{count} needs {count} devices, but JAX has {len(devices)} on this "
            f"CPU; set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return devices[:count]


def _tpu_devices(name: str) -> list[jax.Device]:
    # Nobody is to be asked for a slice that is not there, which would take minutes; and several may
    # compile at once, where but one may run.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name} needs libtpu, the compiler for TPUs; install the extra: "
            "pip install 'rlhf-jax[tpu]'."
        )
    try:
        with quiet():
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--topology {name} is no slice of TPUs ({reason}); give {KNOWN}."
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keeps what libtpu logs by itself off the screen; yields its lines, at the end."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as log:
        there = os.dup(2)
        try:
            os.dup2(log.fileno(), 2)
            yield lines
        finally:
            os.dup2(there, 2)
            os.close(there)
            log.seek(0)
            lines += log.read().decode(errors="replace").splitlines()
