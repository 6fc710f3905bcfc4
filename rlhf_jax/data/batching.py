"""The order of examples and batches: a pure function of (seed, step), so that a resumed run needs
only its step number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from rlhf_jax.batches import PairBatch, PromptBatch, RankingBatch, TextBatch, UnpairedBatch
from rlhf_jax.checks import PositiveInt, check_fields
from rlhf_jax.data.encoding import MULTIPLE
from rlhf_jax.data.settings import Buckets
from rlhf_jax.errors import InputError

Batch = TypeVar("Batch", TextBatch, PairBatch, RankingBatch, UnpairedBatch, PromptBatch)

# Fields of batches that share their last axis. An example is as long as the longest of them, which
# are its masks and segments: other fields may hold zeros on real positions.
GROUPS = (
    ("prompts", "prompt_mask"),
    ("chosen", "chosen_mask", "rejected", "rejected_mask"),
    ("responses", "mask"),
    ("other", "other_mask"),
    ("tokens", "segments", "loss_mask"),
    ("target_positions",),
)


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
    batch_size: PositiveInt
    seed: int
    shuffle: bool = True
    buckets: Buckets = 1

    def __post_init__(self) -> None:
        check_fields("batches", self)
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

    def at(self, step: int) -> Batch:
        """The batch of step 0, 1, 2, ...: NumPy arrays [batch_size, ...]."""
        return self.slice_at(step, 0, self.batch_size)

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

    def _widths(self, indices: Any) -> list[int] | None:
        """The smallest of the bucket widths that hold the longest of these examples."""
        if self.buckets == 1:
            return None
        needed = [int(lengths[indices].max()) for lengths in self._lengths]
        full_widths = _full_widths(self.examples)
        for bucket in range(1, self.buckets):
            multiples = [-(-full * bucket // (self.buckets * MULTIPLE)) for full in full_widths]
            widths = [min(full, MULTIPLE * n) for full, n in zip(full_widths, multiples)]
            if all(need <= width for need, width in zip(needed, widths, strict=True)):
                return widths
        return None

    @functools.cached_property
    def _lengths(self) -> list[Any]:
        """The length of each example in each group of fields, i64[N] each."""

        def longest(array: Any) -> Any:
            return np.count_nonzero(array, axis=-1).reshape(self.num_examples, -1).max(axis=1)

        return [
            np.max([longest(getattr(self.examples, name)) for name in group], axis=0)
            for group in _groups(self.examples)
        ]


def eval_batches(examples: Batch, batch_size: int) -> Iterator[Batch]:
    """The examples, NumPy arrays [N, ...], in their order, in batches [batch_size, ...].

    The last one is padded with 0 and False in all arrays: tokens, masks, segments,
    `valid`, and `PromptBatch.indices`, where the mask and not the index shows padding.
    """
    for start in range(0, examples[0].shape[0], batch_size):
        yield _map_arrays(functools.partial(_padded, start, start + batch_size), examples)


def _map_arrays(function: Callable[[Any], Any], batch: Any) -> Any:
    """`jax.tree.map` of a NamedTuple without an import of jax; its fields may be None or nested."""
    if batch is None:
        return None
    if isinstance(batch, tuple):
        return type(batch)(*(_map_arrays(function, field) for field in batch))
    return function(batch)


def _padded(start: int, stop: int, array: Any) -> Any:
    """Entries `start` to `stop` of an array, with zeros past its end."""
    batch = np.asarray(array[start:stop])
    return np.pad(batch, [(0, stop - start - len(batch))] + [(0, 0)] * (batch.ndim - 1))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> Any:
    permutation = np.random.default_rng((seed, epoch)).permutation(num_examples)
    permutation.flags.writeable = False  # the cache shares it between callers
    return permutation


def _groups(examples: Batch) -> list[tuple[str, ...]]:
    """The groups of fields whose last axes are trimmed together, those of the prompts first."""
    return [group for group in GROUPS if getattr(examples, group[0], None) is not None]


def _full_widths(examples: Batch) -> list[int]:
    """The width of each group."""
    return [getattr(examples, group[0]).shape[-1] for group in _groups(examples)]


def _trim(batch: Batch, widths: Sequence[int]) -> Batch:
    """The batch without the padding beyond these widths: left of prompts, right of the rest."""
    parts: dict[str, Any] = {}
    for group, full, width in zip(_groups(batch), _full_widths(batch), widths, strict=True):
        kept = slice(full - width, None) if group is GROUPS[0] else slice(width)
        parts |= {name: getattr(batch, name)[..., kept] for name in group}
    return batch._replace(**parts)
