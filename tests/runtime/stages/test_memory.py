"""The estimate of memory before the first step: its parts, its line, and its warning."""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.runtime.config import PPOConfig, SFTConfig, resolve
from rlhf_jax.runtime.program import Placement
from rlhf_jax.runtime.stages import memory
from rlhf_jax.runtime.stages.memory import Memory, as_line, check, estimate
from rlhf_jax.runtime.stages.offline import PolicyStage
from rlhf_jax.runtime.stages.online import OnlineStage
from tests import small

GIB = 2**30


class State(NamedTuple):
    params: Any
    opt_state: Any
    frozen: Any
    step: Any


def test_the_parts_are_those_of_the_state_and_of_the_compiled_step():
    matrix = jnp.ones((512, 256))
    state = State(matrix, (matrix * 0.5, matrix * 2.0), {"ref": jnp.ones((3, 256))}, jnp.zeros(()))
    traces = []

    def step(state, batch, key):
        traces.append(1)
        kept = jnp.exp(batch @ state.params)  # 64 * 256 numbers at least, beside the gradient
        grads = jax.grad(lambda w: jnp.sum(kept * jnp.sin(batch @ w)))(state.params)
        moments = jax.tree.map(lambda moment: moment + grads, state.opt_state)
        params = state.params - jnp.sqrt(moments[0] + moments[1])
        return state._replace(params=params, opt_state=moments), {"norm": jnp.sum(grads)}

    place = Placement(make_mesh(MeshSettings()), ((".*", jax.sharding.PartitionSpec()),))
    batch, key = np.ones((64, 512), np.float32), jax.random.key(0)
    state = jax.device_put(state, place.shardings(state))
    with jax.set_mesh(place.mesh):
        function = place.step(step, state)
        estimated = estimate(place, state, [(function, (state, batch, key))])
        function(state, batch, key)
    assert len(traces) == 1
    size = 4 * 512 * 256
    assert (estimated.weights, estimated.moments, estimated.frozen) == (size, 2 * size, 4 * 3 * 256)
    assert estimated.step >= batch.nbytes + 4 * 64 * 256
    assert estimated.step < 4 * size
    assert estimated.rest > 0  # of this process
    assert estimated.total == sum(estimated[:5])


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    host = memory._host_bytes()
    assert host > GIB / 4
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP", limit)
    for text, expected in (("max\n", host), ("4096\n", 4096), (f"{2 * host}\n", host)):
        limit.write_text(text)
        assert memory._host_bytes() == expected


def test_the_line_fits_a_terminal():
    need = Memory(*(int(x * GIB) for x in (12.04, 98.7, 24.1, 61.234, 0)), 80 * GIB)
    line = as_line("reward", need, num_devices=8)
    assert line == ("reward: memory 196/80 GiB a device: weights 12 frozen 99 moments 24 step 61")
    small_one = Memory(2**20, 0, 2**21, 2**28, 0, None)
    assert as_line("ppo", small_one) == "ppo: memory 0.2 GiB: weights 0 moments 0 step 0.2"
    on_cpu = Memory(*(int(x * GIB) for x in (0.51, 0.52, 1.03, 0.94, 0.45)), int(62.8 * GIB))
    assert max(len(as_line("reward", on_cpu)), len(line)) <= 80


def test_too_little_memory_is_a_warning(caplog):
    check("sft", Memory(GIB, 0, 2 * GIB, GIB, 0, 4 * GIB))
    check("sft", Memory(GIB, 0, 2 * GIB, GIB, 0, None))
    assert not caplog.records
    check("sft", Memory(GIB, 0, 2 * GIB, GIB, 1, 4 * GIB))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "A step of sft needs some 4.0 GiB of memory, and there are 4.0: see the page on memory"
    )


@pytest.mark.parametrize("kind", ["offline", "rollout and update"])
def test_a_run_prints_it_once_and_compiles_no_program_twice(tmp_path, sft_run, kind, capsys):
    if kind == "offline":
        stage = PolicyStage(resolve(SFTConfig, small.sft(tmp_path)))
    else:
        config = small.ppo(tmp_path, sft_run[0])
        stage = OnlineStage(resolve(PPOConfig, config), small.short_response)
    compiled = []

    def hear(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(more.get("fun_name", ""))

    with jax.set_mesh(stage.mesh):
        state = stage.init_state()
        capsys.readouterr()
        jax.monitoring.register_event_duration_secs_listener(hear)
        try:
            for index in range(2):
                state, *_ = stage.step(state, index)
        finally:
            jax.monitoring.unregister_event_duration_listener(hear)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{stage.name}: memory ")
    assert "moments" in line
    steps = [name for name in compiled if "step" in name]
    assert len(steps) == len(set(steps)) == (1 if kind == "offline" else 2)
