"""What the two supervised stages share: batches through one compiled step."""

from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.backend import compiler_options
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import (
    batch_sharding,
    check_batch_size,
    replicated,
    tree_shardings,
)
from rlhf_jax.runtime import loading as assemble
from rlhf_jax.runtime.commands.evaluate import sum_metrics
from rlhf_jax.training.state import make_optimizer


def check_micro_batches(mesh: Mesh, section: str, settings: Any) -> None:
    """Raises an InputError if the rows of a step, or of a part of it, miss the mesh."""
    steps = settings.gradient_accumulation_steps
    name = f"{section}.batch_size"
    if steps > 1:
        name = f"{name} / {section}.gradient_accumulation_steps"
    check_batch_size(mesh, name, settings.batch_size // steps)


class SupervisedStage:
    """The common half of `SFTStage` and `RewardStage`; see `loop.Stage`.

    A subclass reads its data and model into `config`, `mesh`, `model`, `params` (in their places on
    the mesh), `batches` (of training rows), `held_out` (rows, or None), `total_steps`, and two
    keys, `init_key` and `key`; then it calls `compile_step`.
    """

    config: Any
    mesh: Mesh
    model: Any
    params: Any
    batches: Any
    held_out: Any
    total_steps: int
    flops_per_step = 0.0
    init_key: jax.Array
    key: jax.Array

    def compile_step(self, training: Any, settings: Any, *, unembeds: bool) -> None:
        """Prepares the steps of `training.sft` or `training.reward` for the mesh.

        `unembeds` tells whether the stage computes logits, for the count of FLOPs.
        """
        optimizer = make_optimizer(self.config.optimizer, self.total_steps)

        def init(params):
            return training.init_state(
                self.model, params, settings, self.init_key, optimizer=optimizer
            )

        self._init = init
        shape = jax.eval_shape(init, self.params)
        frozen = self.model.flops_per_token(shape.frozen, unembeds=False)
        trained = self.model.flops_per_token(shape.params, unembeds=unembeds)
        self.flops_per_token = frozen + 3.0 * trained
        state, rows, whole = (
            tree_shardings(self.mesh, shape, self.model.partition_rules),
            batch_sharding(self.mesh),
            replicated(self.mesh),
        )
        self.rows = rows
        self._step = jax.jit(
            training.make_step(self.model, settings, optimizer=optimizer),
            in_shardings=(state, rows, whole),
            out_shardings=(state, whole),
            donate_argnums=0,
            compiler_options=compiler_options(self.mesh.devices.flat[0].platform),
        )
        self._evaluate = jax.jit(
            training.make_eval_step(self.model),
            in_shardings=(
                tree_shardings(
                    self.mesh, jax.eval_shape(self.whole, shape), self.model.partition_rules
                ),
                rows,
            ),
            out_shardings=whole,
        )

    def whole(self, state: Any) -> Any:
        """The parameters of the whole model."""
        return state.params

    def init_state(self) -> Any:
        """The state before the first step, sharded; the loaded parameters are let go."""
        state = assemble.init_sharded(
            self.mesh, self.model.partition_rules, self._init, self.params
        )
        self.params = None
        return state

    def step(self, state: Any, index: int) -> Any:
        """One optimizer step on batch number `index`."""
        key = jax.random.fold_in(self.key, index)
        state, metrics = self._step(state, assemble.batch_at(self.batches, index, self.rows), key)
        return state, metrics, None

    def observe(self, output: Any) -> dict[str, float]:
        """Nothing: all metrics come from the device."""
        return {}

    def held_out_means(self, state: Any, batch_size: int) -> dict[str, float]:
        """The evaluation's metrics, means over all held-out tokens or pairs; {} without any."""
        if self.held_out is None:
            return {}
        batches, params = eval_batches(self.held_out, batch_size), self.whole(state)
        placed = (hosts.from_host(batch, self.rows) for batch in batches)
        sums = sum_metrics(self._evaluate(params, batch) for batch in placed)
        count = sums.pop("count")
        return {f"eval/{name}": value / count for name, value in sums.items()}

    def saved(self, state: Any) -> Any:
        """All but a frozen half, which is read or made again; of that a checksum."""
        return assemble.saved_parts(state)

    def resumed(self, state: Any, saved: Any) -> Any:
        """The saved parts, beside the frozen half if it is still what it was."""
        return assemble.resumed_state(state, saved, self.config.run_dir, [self.config.model.path])
