"""Which rows make up which batch: a pure function of (seed, step), so that a resumed run needs a
step number and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from rlhf_jax.batches import PairBatch, PromptBatch, RankingBatch, TextBatch
from rlhf_jax.data.encoding import MULTIPLE
from rlhf_jax.errors import InputError

Batch = TypeVar("Batch", TextBatch, PairBatch, RankingBatch, PromptBatch)

MAX_BUCKETS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Batches(Generic[Batch]):
    """An endless stream of batches over a data set that is permuted anew in every epoch.

    The epochs follow each other without a gap: a batch may hold the end of one and the beginning
    of the next, nothing is dropped, and a batch may be larger than the data set.

    Attributes:
      examples: the whole data set, NumPy arrays [N, ...].
      batch_size: rows of a batch, of all hosts together.
      seed: of the permutations; epoch e is permuted by (seed, e).
      shuffle: False takes the rows in their order.
      buckets: how many different shapes a batch may take, 1 to 4. With more than one, padding that
        no row of the batch needs is cut off down to one of so many evenly spaced widths.

    >>> import numpy as np
    >>> prompts = PromptBatch(np.ones((5, 8), int), np.ones((5, 8), bool), np.arange(5))
    >>> [Batches(prompts, 2, seed=0, shuffle=False).at(step).indices.tolist() for step in range(3)]
    [[0, 1], [2, 3], [4, 0]]
    """

    examples: Batch
    batch_size: int
    seed: int
    shuffle: bool = True
    buckets: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"The batch size is {self.batch_size}: set it to 1 or more.")
        if not 1 <= self.buckets <= MAX_BUCKETS:
            raise InputError(
                f"The number of length buckets is {self.buckets}: it is 1 to {MAX_BUCKETS}."
            )
        if self.num_examples < 1:
            raise InputError("There are no rows to make batches of.")

    @property
    def num_examples(self) -> int:
        """N, the rows of the data set."""
        return self.examples[0].shape[0]

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every row has been seen at least once."""
        return -(-self.num_examples // self.batch_size)

    def at(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of a step, or the part of it that one of several hosts feeds.

        Args:
          step: 0, 1, 2, ...
          process_index: which host, of
          process_count: how many; they divide the batch into equal runs of rows.

        Returns:
          A batch [batch_size / process_count, ...] of NumPy arrays. Its widths are the same on
          every host.

        Raises:
          InputError: if the hosts do not divide the batch.
        """
        part = _part(self.batch_size, process_index, process_count)
        return self.rows_at(step, part.start, part.stop)

    def rows_at(self, step: int, start: int, stop: int) -> Batch:
        """Some rows of the batch of a step, from `start` to `stop`, in the widths of the whole."""
        indices = self.indices(step)
        widths = self._widths(indices)
        mine = indices[start:stop]
        # Not field by field, since a PromptBatch may hold no texts.
        batch = jax.tree.map(lambda array: array[mine], self.examples)
        return batch if widths is None else _trim(batch, widths)

    def indices(self, step: int) -> Any:
        """i64[batch_size], the rows of the data set that make up the batch of a step."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(places, self.num_examples)
        if not self.shuffle:
            return within
        parts = [
            _permutation(self.seed, int(epoch), self.num_examples)[within[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts)

    def _widths(self, indices: Any) -> tuple[int, ...] | None:
        """The smallest of the bucket widths that hold the longest of these rows."""
        if self.buckets == 1:
            return None
        needed = [int(lengths[indices].max()) for lengths in self._lengths]
        for bucket in range(1, self.buckets):
            widths = tuple(self._bucket(full, bucket) for full in _full_widths(self.examples))
            if all(need <= have for need, have in zip(needed, widths, strict=True)):
                return widths
        return None

    def _bucket(self, full: int, bucket: int) -> int:
        """Width number `bucket` (1, 2, ...) of those below the full one: a multiple of 8."""
        return min(full, -(-full * bucket // (self.buckets * MULTIPLE)) * MULTIPLE)

    @functools.cached_property
    def _lengths(self) -> tuple[Any, ...]:
        return _lengths(self.examples)


def eval_batches(
    rows: Batch, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The rows in their order, in batches of one size; the last is filled up with inert rows.

    Args:
      examples: the whole data set, NumPy arrays [N, ...].
      batch_size: rows of a batch, of all hosts together.
      process_index: which host, of
      process_count: how many; they divide each batch into equal runs of rows.

    Yields:
      Batches [batch_size / process_count, ...]. Inert rows are 0 and False in all their arrays:
      tokens, masks, segments, `PairBatch.valid`, and `PromptBatch.indices`, whose filling is told
      by its mask and not by its index.

    Raises:
      InputError: if the hosts do not divide the batch.
    """
    part = _part(batch_size, process_index, process_count)
    for start in range(0, rows[0].shape[0], batch_size):
        rows_of_batch = slice(start, start + batch_size)
        yield jax.tree.map(functools.partial(_filled, rows_of_batch, part), rows)


def _filled(rows: slice, part: slice, array: Any) -> Any:
    """A part of these rows of an array, with rows of zeros for those that it does not have."""
    batch = np.asarray(array[rows])
    missing = rows.stop - rows.start - batch.shape[0]
    return np.pad(batch, [(0, missing)] + [(0, 0)] * (batch.ndim - 1))[part]


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a batch that one host feeds."""
    if batch_size % process_count:
        raise InputError(
            f"The batch size is {batch_size}, which {process_count} hosts cannot divide: make it a "
            f"multiple of {process_count}."
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> Any:
    permutation = np.random.default_rng((seed, epoch)).permutation(rows)
    permutation.flags.writeable = False  # it is shared by all who ask for this epoch
    return permutation


def _full_widths(rows: Batch) -> tuple[int, ...]:
    """The widths that can be cut: L, or L and K, or P and T, or P."""
    if isinstance(rows, PairBatch):
        return rows.prompts.shape[1], rows.chosen.shape[1]
    if isinstance(rows, RankingBatch):
        return rows.prompts.shape[1], rows.responses.shape[2]
    if isinstance(rows, TextBatch) and rows.target_positions is not None:
        return rows.tokens.shape[1], rows.target_positions.shape[1]
    return (rows[0].shape[1],)


def _lengths(rows: Batch) -> tuple[Any, ...]:
    """How much of each of these widths every row needs, i64[N] each."""
    if isinstance(rows, PairBatch):
        responses = np.maximum(rows.chosen_mask.sum(1), rows.rejected_mask.sum(1))
        return rows.prompt_mask.sum(1), responses
    if isinstance(rows, RankingBatch):
        return rows.prompt_mask.sum(1), rows.mask.sum(2).max(1)
    if isinstance(rows, PromptBatch):
        return (rows.prompt_mask.sum(1),)
    lengths = (rows.segments > 0).sum(1)
    return (
        (lengths,)
        if rows.target_positions is None
        else (lengths, (rows.target_positions > 0).sum(1))
    )


def _trim(batch: Batch, widths: tuple[int, ...]) -> Batch:
    """The batch without the padding beyond these widths: left of prompts, right of the rest."""
    if isinstance(batch, TextBatch):
        tokens, segments, loss_mask = (array[:, : widths[0]] for array in batch[:3])
        target_positions = (
            None if batch.target_positions is None else batch.target_positions[:, : widths[1]]
        )
        return TextBatch(tokens, segments, loss_mask, target_positions)
    prompt = batch.prompts.shape[1] - widths[0]
    left = {name: getattr(batch, name)[:, prompt:] for name in ("prompts", "prompt_mask")}
    if isinstance(batch, PromptBatch):
        return batch._replace(**left)
    if isinstance(batch, RankingBatch):
        responses, mask = (x[:, :, : widths[1]] for x in (batch.responses, batch.mask))
        return batch._replace(**left, responses=responses, mask=mask)
    names = ("chosen", "chosen_mask", "rejected", "rejected_mask")
    right = {name: getattr(batch, name)[:, : widths[1]] for name in names}
    return batch._replace(**left, **right)
