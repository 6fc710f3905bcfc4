"""The reward model of a run, normalized on responses that it is trained on."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.data.batching import Batches, eval_batches
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import batch_sharding, tree_shardings
from rlhf_jax.training import normalization, reward


class Normalizer:
    """Gives a reward model's scores of the preferred responses mean 0 and variance 1.

    They are those of the rows that the run trains on first: a random sample, the same whenever the
    run is begun or continued.

    Args:
      rows: all training rows, a `PairBatch` or a `RankingBatch` of NumPy arrays.
      settings: `normalize_rows` and `eval_batch_size` of them.
      seed: of the run.
    """

    def __init__(
        self, model: Model, mesh: Mesh, rows: Any, settings: reward.Settings, seed: int
    ) -> None:
        self._model, self._mesh, self._batch_size = model, mesh, settings.eval_batch_size
        count = min(settings.normalize_rows, len(rows[0]))
        self._rows = Batches(rows, count, seed).at(0)
        self._add = jax.jit(normalization.make_stats_step(model))

    def __call__(self, params: Params, frozen: Params | None = None) -> Params:
        """The parameters that score so; all but the head and the final norm are the same arrays.

        Args:
          params: of a reward model; its "model" may be the trained half above `frozen`.

        Raises:
          InputError: the scores do not differ.
        """
        place = batch_sharding(self._mesh)
        batches = (hosts.put(batch, place) for batch in eval_batches(self._rows, self._batch_size))
        add = functools.partial(self._add, frozen=frozen)
        moments = normalization.score_moments(normalization.stats_of(add, params, batches))
        normalized = normalization.normalize_scores(self._model, params, *moments)
        return jax.device_put(normalized, tree_shardings(self._mesh, normalized))
