"""The order of examples and batches: a pure function of (seed, step), so that a resumed run needs
only its step number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from rlhf_jax.batches import PairBatch, PromptBatch, RankingBatch, TextBatch
from rlhf_jax.data.encoding import MULTIPLE
from rlhf_jax.data.settings import MAX_BUCKETS
from rlhf_jax.errors import InputError

Batch = TypeVar("Batch", TextBatch, PairBatch, RankingBatch, PromptBatch)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches(Generic[Batch]):
    """An endless stream of batches over a data set that is shuffled anew in every epoch.

    Epochs follow each other without a gap: a batch may hold the end of one and the beginning of the
    next, no example is dropped, and a batch may be larger than the data set.

    Attributes:
      examples: the entire data set, NumPy arrays [N, ...].
      batch_size: global batch size, over all hosts.
      seed: of the permutations; epoch e is permuted by (seed, e).
      shuffle: False keeps the order of the data set.
      buckets: maximum number of different batch shapes, 1 to 4. With more than one, padding that no
        example of the batch needs is removed, down to one of this number of evenly spaced widths.

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
            raise InputError("There are no examples to make batches of.")

    @property
    def num_examples(self) -> int:
        """N, the size of the data set."""
        return self.examples[0].shape[0]

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps after which every example was used at least once."""
        return -(-self.num_examples // self.batch_size)

    def at(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of a step, or one host's part of it.

        Args:
          step: 0, 1, 2, ...
          process_index: index of the host.
          process_count: number of hosts; each has an equal contiguous part of the batch.

        Returns:
          A batch [batch_size / process_count, ...] of NumPy arrays. Its widths are the same on
          every host.

        Raises:
          InputError: if the batch size is not a multiple of the number of hosts.
        """
        part = _part(self.batch_size, process_index, process_count)
        return self.slice_at(step, part.start, part.stop)

    def slice_at(self, step: int, start: int, stop: int) -> Batch:
        """Examples `start` to `stop` of the batch of a step, in the widths of the full batch."""
        indices = self.indices(step)
        widths = self._widths(indices)
        selected = indices[start:stop]
        batch = _map_arrays(lambda array: array[selected], self.examples)
        return batch if widths is None else _trim(batch, widths)

    def indices(self, step: int) -> Any:
        """i64[batch_size], the indices into the data set of the batch of a step."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(positions, self.num_examples)
        if not self.shuffle:
            return within
        parts = [
            _permutation(self.seed, int(epoch), self.num_examples)[within[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts)

    def _widths(self, indices: Any) -> tuple[int, ...] | None:
        """The smallest of the bucket widths that hold the longest of these examples."""
        if self.buckets == 1:
            return None
        needed = [int(lengths[indices].max()) for lengths in self._lengths]
        for bucket in range(1, self.buckets):
            widths = tuple(self._bucket(full, bucket) for full in _full_widths(self.examples))
            if all(need <= width for need, width in zip(needed, widths, strict=True)):
                return widths
        return None

    def _bucket(self, full: int, bucket: int) -> int:
        """Width number `bucket` (1, 2, ...) of those below the full one: a multiple of 8."""
        return min(full, -(-full * bucket // (self.buckets * MULTIPLE)) * MULTIPLE)

    @functools.cached_property
    def _lengths(self) -> tuple[Any, ...]:
        return _lengths(self.examples)


def eval_batches(
    examples: Batch, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The examples in their order, in batches of one size; the last one is padded with zeros.

    Args:
      examples: the entire data set, NumPy arrays [N, ...].
      batch_size: global batch size, over all hosts.
      process_index: index of the host.
      process_count: number of hosts; each has an equal contiguous part of each batch.

    Yields:
      Batches [batch_size / process_count, ...]. Padding entries are 0 and False in all arrays:
      tokens, masks, segments, `PairBatch.valid`, and `PromptBatch.indices`, where the mask and not
      the index tells them apart.

    Raises:
      InputError: if the batch size is not a multiple of the number of hosts.
    """
    part = _part(batch_size, process_index, process_count)
    for start in range(0, examples[0].shape[0], batch_size):
        pad = functools.partial(_padded_part, slice(start, start + batch_size), part)
        yield _map_arrays(pad, examples)


def _map_arrays(function: Callable[[Any], Any], batch: Any) -> Any:
    """`jax.tree.map` of a NamedTuple without an import of jax; its fields may be None or nested."""
    if batch is None:
        return None
    if isinstance(batch, tuple):
        return type(batch)(*(_map_arrays(function, field) for field in batch))
    return function(batch)


def _padded_part(selected: slice, part: slice, array: Any) -> Any:
    """A part of the selected entries of an array, with zeros past its end."""
    batch = np.asarray(array[selected])
    missing = selected.stop - selected.start - batch.shape[0]
    return np.pad(batch, [(0, missing)] + [(0, 0)] * (batch.ndim - 1))[part]


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
    """One host's part of a batch."""
    if batch_size % process_count:
        raise InputError(
            f"The batch size is {batch_size}, which {process_count} hosts cannot divide: make it a "
            f"multiple of {process_count}."
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> Any:
    permutation = np.random.default_rng((seed, epoch)).permutation(num_examples)
    permutation.flags.writeable = False  # the cache shares it between callers
    return permutation


def _full_widths(examples: Batch) -> tuple[int, ...]:
    """The widths that can be trimmed: L, or L and K, or P and T, or P."""
    if isinstance(examples, PairBatch):
        return examples.prompts.shape[1], examples.chosen.shape[1]
    if isinstance(examples, RankingBatch):
        return examples.prompts.shape[1], examples.responses.shape[2]
    if isinstance(examples, TextBatch) and examples.target_positions is not None:
        return examples.tokens.shape[1], examples.target_positions.shape[1]
    return (examples[0].shape[1],)


def _lengths(examples: Batch) -> tuple[Any, ...]:
    """The length of each example along each of these widths, i64[N] each."""
    if isinstance(examples, PairBatch):
        responses = np.maximum(examples.chosen_mask.sum(1), examples.rejected_mask.sum(1))
        return examples.prompt_mask.sum(1), responses
    if isinstance(examples, RankingBatch):
        return examples.prompt_mask.sum(1), examples.mask.sum(2).max(1)
    if isinstance(examples, PromptBatch):
        return (examples.prompt_mask.sum(1),)
    lengths = (examples.segments > 0).sum(1)
    if examples.target_positions is None:
        return (lengths,)
    return lengths, (examples.target_positions > 0).sum(1)


def _trim(batch: Batch, widths: tuple[int, ...]) -> Batch:
    """The batch without the padding beyond these widths: left of prompts, right of the rest."""
    if isinstance(batch, TextBatch):
        tokens, segments, loss_mask = (array[:, : widths[0]] for array in batch[:3])
        positions = batch.target_positions
        positions = None if positions is None else positions[:, : widths[1]]
        return TextBatch(tokens, segments, loss_mask, positions)
    start = batch.prompts.shape[1] - widths[0]
    batch = batch._replace(
        prompts=batch.prompts[:, start:], prompt_mask=batch.prompt_mask[:, start:]
    )
    if isinstance(batch, PromptBatch):
        return batch
    if isinstance(batch, RankingBatch):
        return batch._replace(
            responses=batch.responses[:, :, : widths[1]], mask=batch.mask[:, :, : widths[1]]
        )
    return batch._replace(
        chosen=batch.chosen[:, : widths[1]],
        chosen_mask=batch.chosen_mask[:, : widths[1]],
        rejected=batch.rejected[:, : widths[1]],
        rejected_mask=batch.rejected_mask[:, : widths[1]],
    )
