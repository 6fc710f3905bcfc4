"""The one recipe of compilation: `jax.jit` with shardings, donation and compiler options.

States are split by the partition rules of the model, batches over `data` and `fsdp`, keys and
metrics are replicated, and the old state is donated to the new one. Stages run these programs, and
`runtime/compilation/` compiles the same ahead of time.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from rlhf_jax.backend import compiler_options
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import Rules, batch_sharding, replicated, tree_shardings

Step = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a trainer's programs are on a mesh.

    Attributes:
      mesh: of the devices.
      rules: the partition rules of the models whose parameters the arrays hold.
    """

    mesh: Mesh
    rules: Rules

    @property
    def batch(self) -> NamedSharding:
        """Examples over `data` and `fsdp` together."""
        return batch_sharding(self.mesh)

    @property
    def replicated(self) -> NamedSharding:
        """The same full array on every device."""
        return replicated(self.mesh)

    def shardings(self, tree: Any) -> Any:
        """The sharding of each array of a state or of parameters, of which shapes are enough."""
        return tree_shardings(self.mesh, tree, self.rules)

    def bytes_on_device(self, tree: Any) -> int:
        """Bytes of a state or of parameters on one device; shapes are enough."""

        def size(leaf: Any, sharding: NamedSharding) -> int:
            return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

        return sum(jax.tree.leaves(jax.tree.map(size, tree, self.shardings(tree))))

    def put(self, batch: Any) -> Any:
        """A batch of NumPy arrays on the devices, where one process does not hold all of them."""
        return hosts.from_host(batch, self.batch)

    def initialise(self, init: Step, *args: Any) -> Any:
        """init(*args) under jit, each array of the result initialised in its place."""
        shardings = self.shardings(jax.eval_shape(init, *args))
        return jax.jit(init, out_shardings=shardings)(*args)

    def step(self, step: Step, state: Any, *, returns_batch: bool = False) -> Any:
        """A jitted (state, batch, key) -> (state, metrics), donating the state.

        Of the state, shapes are enough. With `returns_batch` the step has a third result, a rollout
        with the axis of the batch.
        """
        return self._update(step, state, num_batches=1, returns_batch=returns_batch)

    def rollout(self, sample: Step, state: Any) -> Any:
        """A jitted (state, batch, key) -> rollout; the state stays."""
        places = (self.shardings(state), self.batch, self.replicated)
        return jax.jit(sample, in_shardings=places, out_shardings=self.batch)

    def update(self, update: Step, state: Any) -> Any:
        """A jitted (state, batch, rollout, scores, key) -> (state, metrics, rollout)."""
        return self._update(update, state, num_batches=3, returns_batch=True)

    def _update(self, step: Step, state: Any, *, num_batches: int, returns_batch: bool) -> Any:
        place = self.shardings(state)
        results = (place, self.replicated, *([self.batch] if returns_batch else []))
        return jax.jit(
            step,
            in_shardings=(place, *[self.batch] * num_batches, self.replicated),
            out_shardings=results,
            donate_argnums=0,
            compiler_options=compiler_options(self.mesh.devices.flat[0].platform),
        )

    def evaluation(self, evaluate: Step, params: Any) -> Any:
        """A jitted (params, batch) -> replicated metrics; of `params`, shapes are enough."""
        places = (self.shardings(params), self.batch)
        return jax.jit(evaluate, in_shardings=places, out_shardings=self.replicated)

    def scores(self, score: Step, params: Any) -> Any:
        """A jitted (params, batch) -> arrays with the axis of the batch."""
        places = (self.shardings(params), self.batch)
        return jax.jit(score, in_shardings=places, out_shardings=self.batch)


def held_bytes(memory: Any, state_bytes: int, platform: str) -> int:
    """Bytes that are held on a device at one time at most while a compiled program runs.

    With all of the state, also the part that the program does not read.

    Args:
      memory: the `memory_analysis` of the program.
      state_bytes: of its first argument.
    """
    arguments = memory.argument_size_in_bytes
    held = arguments + memory.output_size_in_bytes + memory.temp_size_in_bytes
    held -= memory.alias_size_in_bytes
    if platform == "tpu":
        held = memory.peak_memory_in_bytes
    return held + max(0, state_bytes - arguments)
