"""Joins the processes of one run: `jax.distributed`, on clusters and by hand."""

import contextlib
import importlib.util
import logging
import os
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import jax

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.settings import DistributedSettings

CUT_OFF = 30  # seconds between our time limit and JAX's, at which JAX aborts the process


def join(settings: DistributedSettings) -> None:
    """Joins the other processes of the run; does nothing in a single process or a second time.

    Call it before anything initializes a device. On the CPU the processes exchange arrays by Gloo,
    JAX's default there.

    Raises:
      InputError: JAX has begun to use the devices, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    arguments = _arguments(settings)
    if arguments is None:
        return
    if settings.process_id:
        _wait_for(settings.coordinator or "", settings.timeout)
    with _time_limit(settings.timeout):
        try:
            jax.distributed.initialize(
                **arguments, initialization_timeout=settings.timeout + CUT_OFF
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(_reason(settings, " ".join(str(error).split()))) from error
    if _uses_all_gpus(settings):
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, "all")
    if jax.process_index() > 0:  # the first process warns for all
        logging.getLogger("rlhf_jax").setLevel(logging.ERROR)


def _arguments(settings: DistributedSettings) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None in a single process."""
    local = list(settings.local_device_ids) or None
    arguments: dict[str, Any] = {"local_device_ids": local}
    if settings.coordinator is not None:
        arguments |= {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.num_processes,
            "process_id": settings.process_id,
            "cluster_detection_method": "deactivate",
        }
        return arguments if settings.num_processes != 1 else None
    if not settings.auto:
        return None
    if _slurm_tasks() > 1 or _tpu_workers() > 1:
        return arguments
    if _mpi_processes() > 1:
        # JAX detects Open MPI before version 5 by this variable.
        is_detected = "OMPI_MCA_orte_hnp_uri" in os.environ
        return {**arguments, "cluster_detection_method": None if is_detected else "mpi4py"}
    return None


def _slurm_tasks() -> int:
    """Tasks of the `srun` that started this process; 1 without one."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in os.environ for name in needed):
        return 1
    return int(os.environ.get("SLURM_NTASKS", "1"))


def _mpi_processes() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))


def _uses_all_gpus(settings: DistributedSettings) -> bool:
    """Whether JAX would use one GPU alone, though no other process shares this machine."""
    if settings.coordinator is not None or settings.local_device_ids:
        return False
    if _slurm_tasks() > 1:
        tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        return all(part.split("(")[0] == "1" for part in tasks.split(","))
    return _mpi_processes() > 1 and os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _tpu_workers() -> int:
    """Hosts of the Cloud TPU slices that this one belongs to; 1 elsewhere."""
    # At its import JAX sets "tpu,cpu" on a machine with TPUs, and on no other.
    if "tpu" not in (jax.config.jax_platforms or ""):
        return 1
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    hosts = next((os.environ[name] for name in names if name in os.environ), None)
    hosts = _metadata("worker-network-endpoints") if hosts is None else hosts
    slices = os.environ.get("MEGASCALE_NUM_SLICES")
    if not slices:  # in lines such as MEGASCALE_NUM_SLICES: '2'
        named = re.search(r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _metadata("tpu-env"), re.M)
        slices = named[1] if named else "1"
    return len(hosts.split(",")) * int(slices)


def _metadata(key: str) -> str:
    """An attribute of this machine in Google Cloud; "" if there is none."""
    address = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _wait_for(coordinator: str, timeout: int) -> None:
    """Returns when the port of process 0 is open.

    Otherwise JAX would end the process with a trace of its own when the time is up.
    """
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= until:
                raise InputError(
                    f"Process 0 cannot be reached at distributed.coordinator {coordinator} within "
                    f"{timeout} seconds ({error}): start it, and let that be its address and a "
                    "port that no firewall closes."
                ) from None
        time.sleep(0.2)


@contextlib.contextmanager
def _time_limit(timeout: int) -> Iterator[None]:
    """Ends this process with one sentence if the block takes longer; JAX would abort it."""

    def end() -> None:
        sys.stderr.write(
            f"error: The processes did not all come together within {timeout} seconds: start "
            "distributed.num_processes of them, each with a distributed.process_id of its own.\n"
        )
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reason(settings: DistributedSettings, text: str) -> str:
    """One sentence: why the processes could not join."""
    if "before any JAX" in text:
        return (
            "The processes of a run have to join before JAX uses a device, which it has done "
            "here: call jax.distributed.initialize first, or this earlier."
        )
    if "Failed to start RPC server" in text:
        return (
            f"Process 0 cannot listen at distributed.coordinator {settings.coordinator}: its port "
            "is taken, perhaps by an earlier run; choose another one for all processes."
        )
    if _mpi_processes() > 1 and importlib.util.find_spec("mpi4py") is None:
        return (
            "The processes of Open MPI find each other by mpi4py, which is not installed: install "
            "it, or give distributed.coordinator, distributed.num_processes and "
            "distributed.process_id."
        )
    return f"The processes of this run could not join: {text}"
