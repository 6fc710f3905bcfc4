"""Which processes join which others; joining itself is tested in test_several_processes.py."""

import socket
import threading

import jax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import distributed
from rlhf_jax.parallel.distributed import join
from rlhf_jax.parallel.settings import DistributedSettings

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:2"}
BY_HAND = DistributedSettings("10.0.0.2:8476", 2, 0, (3,))


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, in an environment without any cluster."""
    for name in [*SLURM, *MPI, "TPU_WORKER_HOSTNAMES", "OMPI_COMM_WORLD_LOCAL_SIZE"]:
        monkeypatch.delenv(name, raising=False)

    def change(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def calls(monkeypatch):
    """The arguments that `jax.distributed.initialize` is called with, in place of its work."""
    recorded = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda **arguments: recorded.append(arguments)
    )
    return recorded


def test_a_single_process_joins_nothing(environment, calls):
    join(DistributedSettings())
    join(DistributedSettings("localhost:8476", 1, 0))
    environment(SLURM | {"SLURM_NTASKS": "1"})
    join(DistributedSettings())
    assert calls == []


def test_settings_by_hand_are_taken_as_they_are(environment, calls):
    environment(SLURM)
    join(BY_HAND)
    assert calls == [
        {
            "coordinator_address": "10.0.0.2:8476",
            "num_processes": 2,
            "process_id": 0,
            "local_device_ids": [3],
            "cluster_detection_method": "deactivate",
            "initialization_timeout": 300 + distributed.CUT_OFF,
        }
    ]


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_PROCID"])
def test_processes_of_slurm_join_where_srun_started_them(environment, calls, monkeypatch, missing):
    environment(SLURM)
    join(DistributedSettings())
    join(DistributedSettings(auto=False))
    monkeypatch.delenv(missing)
    join(DistributedSettings())
    assert [call["local_device_ids"] for call in calls] == [None]


def test_one_process_on_a_machine_has_all_its_gpus(environment, calls, monkeypatch):
    changed = []
    monkeypatch.setattr(jax.config, "update", lambda *given: changed.append(given))
    environment(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2"})
    join(DistributedSettings())
    assert changed == []
    environment(SLURM)
    join(DistributedSettings(local_device_ids=(0,)))
    assert changed == []
    join(DistributedSettings())
    assert ("jax_cuda_visible_devices", "all") in changed


def test_open_mpi_is_detected_in_both_versions(environment, calls, monkeypatch):
    environment(MPI)
    join(DistributedSettings())
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    join(DistributedSettings())
    assert [call["cluster_detection_method"] for call in calls] == [None, "mpi4py"]


def test_hosts_of_tpus_are_counted(environment, monkeypatch):
    assert distributed._tpu_workers() == 1  # without asking anyone
    monkeypatch.setattr(distributed.jax, "config", type("", (), {"jax_platforms": "tpu,cpu"}))
    answers = {"worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2", "tpu-env": "TYPE: 'v5'\n"}
    monkeypatch.setattr(distributed, "_metadata", answers.get)
    assert distributed._tpu_workers() == 2
    answers["tpu-env"] += "MEGASCALE_NUM_SLICES: '3'\n"
    assert distributed._tpu_workers() == 6
    environment({"TPU_WORKER_HOSTNAMES": "localhost"})
    answers["tpu-env"] = ""
    assert distributed._tpu_workers() == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "host:1"}, "belong together, but are host:1, None and None"),
        ({"process_id": 1}, "belong together"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "must be host:port"),
        ({"coordinator": ":80", "num_processes": 2, "process_id": 0}, "must be host:port"),
        ({"coordinator": "h:0", "num_processes": 2, "process_id": 0}, "must be host:port"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "they are 2 and 2"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "they are 0 and 0"),
        ({"timeout": 0}, "distributed.timeout must be above 0, but is 0"),
        ({"local_device_ids": (-1,)}, "from 0 on"),
    ],
)
def test_wrong_settings_are_reported(values, message):
    with pytest.raises(InputError, match=message):
        DistributedSettings(**values)


def test_a_coordinator_that_is_not_there_is_reported():
    with socket.socket() as server:
        server.bind(("localhost", 0))  # and does not listen
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"cannot be reached at .*{address} within 1 seconds"):
            join(DistributedSettings(address, 2, 1, timeout=1))


def test_a_coordinator_that_comes_late_is_found():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        is_late = threading.Event()

        def listen():
            is_late.set()
            server.listen()

        threading.Timer(0.3, listen).start()
        distributed._wait_for(f"localhost:{server.getsockname()[1]}", 10)
        assert is_late.is_set()


def test_devices_in_use_are_reported(monkeypatch):
    jax.devices()
    with pytest.raises(InputError, match="have to join before JAX uses a device"):
        join(DistributedSettings("localhost:8476", 2, 0))
