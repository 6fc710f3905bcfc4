import jax
import jax.numpy as jnp

from scripts.benchmark.ours import Worker
from scripts.benchmark.programs import Program


def add(state, batch, key):
    return state + batch, {"loss": state[0]}


def test_a_compilation_after_the_first_step_is_counted():
    program = Program(None, lambda key: jnp.zeros(2), add, jnp.ones(2), "loss")
    worker = Worker(program)
    assert worker.compile()["compile_seconds"] > 0
    assert [worker.step()["loss"] for _ in range(3)] == [0.0, 1.0, 2.0]
    assert worker.stop()["compilations_after_first_step"] == 0
    jax.jit(lambda x: x + 3)(jnp.ones(3))
    assert worker.stop()["compilations_after_first_step"] > 0
