"""Normalization of a reward model on the preferred responses of its training data."""

from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.data.batching import Batches, eval_batches
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.partition import batch_sharding, tree_shardings
from rlhf_jax.rollout.shaping import empty_score_stats
from rlhf_jax.training import reward


class Normalizer:
    """Shifts and scales a reward model's scores of preferred responses to mean 0 and variance 1.

    The mean and variance are those of the examples that the run trains on first: a random sample,
    the same when the run is continued.

    Args:
      examples: all training examples, a `PairBatch` or a `RankingBatch` of NumPy arrays.
      settings: of which `normalize_rows` and `eval_batch_size` are used.
      seed: of the run.
    """

    def __init__(
        self, model: Model, mesh: Mesh, examples: Any, settings: reward.Settings, seed: int
    ) -> None:
        self._model, self._mesh, self._batch_size = model, mesh, settings.eval_batch_size
        count = min(settings.normalize_rows, len(examples[0]))
        self._examples = Batches(examples, count, seed).at(0)
        self._add = jax.jit(reward.make_stats_step(model))

    def __call__(self, params: Params, frozen: Params | None = None) -> Params:
        """The normalized parameters; all but the head and the final norm are the same arrays.

        Args:
          params: of a reward model; its "model" may be the trained half above `frozen`.

        Raises:
          InputError: all scores are equal.
        """
        sharding = batch_sharding(self._mesh)
        stats = empty_score_stats()
        for batch in eval_batches(self._examples, self._batch_size):
            stats = self._add(params, stats, hosts.put(batch, sharding), frozen)
        normalized = reward.normalize_scores(self._model, params, *reward.score_moments(stats))
        shardings = tree_shardings(self._mesh, normalized, self._model.partition_rules)
        return jax.device_put(normalized, shardings)
