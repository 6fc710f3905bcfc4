"""One of several processes that train stages together; it checks their shared values.

Started by test_several_processes.py. The first processes stop each stage after its first
checkpoint, the last one by SIGKILL; others go on from there.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.data.batching import Batches
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import batch_sharding, hosts, make_mesh
from rlhf_jax.parallel.distributed import join
from rlhf_jax.parallel.settings import DistributedSettings, MeshSettings
from rlhf_jax.runtime import train_ppo, train_reward, train_rft, train_sft
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.run.checkpoint import Checkpoints
from rlhf_jax.runtime.run.settings import CheckpointSettings
from rlhf_jax.runtime.stages.offline import OfflineStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small

TRAIN = {"sft": train_sft, "reward": train_reward, "rft": train_rft, "ppo": train_ppo}
# Of the kind "plain" one process continues supervised fine-tuning and rejection sampling, and four
# continue PPO and begin the reward model anew; tools/compare_processes.py continues all stages in
# one process and in four.
PLAIN = {
    "one": tuple(TRAIN),
    "stop": ("sft", "rft", "ppo"),
    "alone": ("sft", "rft"),
    "four": ("reward", "ppo"),
}
STOP_AT = 3  # steps, one behind the checkpoint
MESHES = {1: {}, 2: {"data": 1, "fsdp": 2}, 4: {"data": 2, "tensor": 2}}


class Stopped(Exception):
    """The end of a run that is to be continued."""


def stages_of(folder, kind):
    """The names of the stages in a folder."""
    return tuple(TRAIN) if kind == "full" else PLAIN[folder]


def make_configs(base, folder, processes, kind):
    """The stages in a folder, each from the results of the stage ahead of it in `base / "one"`.

    Of the `kind` "full" they are all, and do all that goes from the devices to the hosts and back;
    compiled in each of many processes, that takes minutes.
    """
    full = kind == "full"
    shared = {"mesh": MESHES[processes], "checkpoint": {"every": 2}}
    shared["data"] = {"eval_rows": 8 if full else 0}
    names, folder = stages_of(folder, kind), base / folder
    sft, rewarded = base / "one" / "sft", base / "one" / "reward"
    function = "tests.small:short_response"
    texts = {"builtin_rows": 16, "eval_rows": 0, "max_length": 16}
    configs = {
        "sft": small.sft(folder / "sft", **shared, sft={"rouge_rows": 4 if full else 0}),
        "reward": small.reward(folder / "reward", sft, **shared, reward={"normalize_before": full}),
        "rft": small.rft(
            folder / "rft",
            sft,
            **shared | {"data": {**shared["data"], "builtin_rows": 32}},
            rft={"num_samples": 2, "batch_size": 8},
        ),
        "ppo": small.ppo(
            folder / "ppo",
            sft,
            rewarded,
            **shared,
            rewards=[{"function": function, "weight": 0.1}],
            evaluation={"gold_fn": function},
            ppo={"ptx_coef": 0.5 if full else 0.0},
            ptx=texts,
        ),
    }
    return {name: configs[name] for name in names}


def _raise(error):
    raise error


def check_what_is_shared():
    """Whatever is known to one process, and arrays that lie on several."""
    place = jax.process_index()
    assert hosts.is_first() == (place == 0)
    assert hosts.from_first(lambda: place) == 0
    table = hosts.from_first(lambda: {3: (0.1, np.float32([0.1, np.nan])), "a": [None, Path("b")]})
    np.testing.assert_equal(table[3], (0.1, np.float32([0.1, np.nan])))
    assert (str(table["a"][1]), table[3][1].dtype) == ("b", np.float32)
    with pytest.raises(TypeError, match="may not hold a object"):
        hosts.from_first(object)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: 'x'"):
        hosts.from_first(_raise, OSError(28, "No space left on device", "x"))
    with pytest.raises(ZeroDivisionError) as error:
        hosts.from_first(lambda: 1 / place)
    assert hosts.is_raised_on_all_hosts(error.value)
    assert hosts.reach_barrier("checked", 60.0)

    agree = hosts.Agreement(2)
    assert agree(place == 1, False) == (False, False)
    assert agree(False, False) == (True, False)
    assert agree(False, False) == (False, False)

    split = batch_sharding(make_mesh(MeshSettings(**MESHES[jax.process_count()])))
    full = {"x": np.arange(24.0).reshape(8, 3), "y": {"z": np.arange(8)}}
    read = []

    def part(start, stop):
        read.append((start, stop))
        return jax.tree.map(lambda array: array[start:stop], full)

    for spanning in (hosts.spanning_batch(part, 8, split), hosts.from_host(full, split)):
        assert not spanning["x"].is_fully_addressable
        jax.tree.map(np.testing.assert_array_equal, hosts.to_host(spanning), full)
    return read


def check_damage(folder):
    """No process continues from a checkpoint that one process cannot read."""
    mesh = make_mesh(MeshSettings(**MESHES[2]))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {"kernel": hosts.from_host(np.arange(4096.0, dtype=np.float32), split)}
    saved = Checkpoints(str(folder), CheckpointSettings())
    for step in (1, 2):
        saved.save(step, state)
    saved.close()
    if hosts.is_first():
        for file in (folder / "checkpoints" / "2").rglob("ocdbt.process_1/d/*"):
            file.write_bytes(file.read_bytes()[:8])
    assert hosts.reach_barrier("damaged", 60.0)
    restored = Checkpoints(str(folder), CheckpointSettings()).restore(state, lambda record: None)
    assert restored.step == 1
    jax.tree.map(np.testing.assert_array_equal, *map(hosts.to_host, (restored.state, state)))
    assert (folder / "checkpoints" / "bad-2").exists()


def check_errors(folder):
    """An error of all is raised by all, and reported by one of them."""
    with pytest.raises(InputError, match=r"sft\.batch_size = 7") as error:
        train_sft(small.sft(folder / "wrong", sft={"batch_size": 7}, mesh=MESHES[2]))
    assert hosts.is_raised_on_all_hosts(error.value)
    assert sorted(path.name for path in (folder / "wrong").iterdir()) == ["config.yaml"]


def stop_stages(monkeypatch):
    """Stages stop behind their first checkpoint; the last process of a PPO run is killed there."""
    step = OfflineStage.step

    def stopping(stage, state, index):
        if index == STOP_AT:
            raise Stopped
        return step(stage, state, index)

    ppo_step = OnlineStage.step

    def killed(stage, state, index):
        if index == STOP_AT and not hosts.is_first():
            saved = Path(stage.config.run_dir) / "checkpoints" / str(STOP_AT - 1)
            until = time.monotonic() + 60.0
            while not saved.exists() and time.monotonic() < until:  # it is being written
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return ppo_step(stage, state, index)

    # The state is not saved at the stop: the continuation repeats a step.
    monkeypatch.setattr(loop._Loop, "_rescue", lambda *_: None)
    monkeypatch.setattr(OfflineStage, "step", stopping)
    monkeypatch.setattr(OnlineStage, "step", killed)


def main(address, processes, place, base, task, kind):
    processes, base = int(processes), Path(base)
    join(DistributedSettings(address, processes, int(place), timeout=60))
    read = []
    slice_at = Batches.slice_at

    def reading(batches, step, start, stop):
        read.append((batches.batch_size, start, stop))
        return slice_at(batches, step, start, stop)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Batches, "slice_at", reading)
        if task == "stop":
            assert check_what_is_shared() == [(4 * int(place), 4 * int(place) + 4)]
            check_errors(base)
            check_damage(base / "damaged")
            stop_stages(monkeypatch)
        for name, config in make_configs(base, task, processes, kind).items():
            if task == "stop" and name != "ppo":
                with pytest.raises(Stopped):
                    TRAIN[name](config)
            else:
                TRAIN[name](config)
    half = 0 if int(place) < processes // 2 else 4
    # The step of normalization reads all; of training batches each process reads its half.
    assert {(start, stop) for size, start, stop in read if size == 8} == {(half, half + 4)}


if __name__ == "__main__":
    main(*sys.argv[1:])
