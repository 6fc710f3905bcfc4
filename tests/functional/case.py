"""A call of a public function on random arrays, and the arrays that several calls share."""

from typing import NamedTuple

import numpy as np

B, T, V, D, K = 4, 6, 7, 5, 5

# Arrays without a batch axis.
SHARED = {"unembedding", "reward_weights"}


class Case(NamedTuple):
    """A call: function(**arrays, **options, **coefficients).

    Attributes:
      arrays: arguments by name; all have the batch as their first axis, but for scalars and for
        what SHARED names.
      options: static keyword arguments.
      coefficients: keyword arguments that may be traced.
      differentiable: names of the arrays to differentiate by.
      masks: by the name of an array the name of the mask whose False entries make it padding.
      count: of a loss, what its `denominator` is for this batch; None if a part of a batch needs
        more than its examples; such a loss has a test of its own.
    """

    arrays: dict
    options: dict = {}
    coefficients: dict = {}
    differentiable: tuple = ()
    masks: dict = {}
    count: float | None = None


def under(mask, *names):
    """`Case.masks` for arrays that share one mask."""
    return dict.fromkeys(names, mask)


def function_name(case_name):
    """'kl_estimate' for the case 'kl_estimate/k3': a function may have one case per kind."""
    return case_name.partition("/")[0]


def total_of(output):
    """A number to differentiate: the first output, its entries weighted from 1 to 2.

    Advantages have a sum of 0, and a gradient of it that is rounding alone.
    """
    first = output[0] if isinstance(output, tuple) else output
    return (first * np.linspace(1, 2, first.size, dtype=np.float32).reshape(first.shape)).sum()


class Batch(NamedTuple):
    """Random arrays that several cases share, under the names of the arguments."""

    mask: np.ndarray
    valid: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    logprobs: np.ndarray
    old_logprobs: np.ndarray
    ref_logprobs: np.ndarray

    def of(self, *names):
        return {name: getattr(self, name) for name in names}


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def make_batch(rng):
    # The first example is full, the others end anywhere after their first token.
    lengths = np.concatenate([[T], rng.integers(1, T, size=B - 1)])
    mask = np.arange(T) < lengths[:, None]
    # One example in the middle only fills up the batch.
    valid = np.arange(B) != 2
    tokens = rng.integers(0, V, size=(B, T)).astype(np.int32)
    targets = rng.integers(0, V - 1, size=(B, T)).astype(np.int32)
    logits = floats(rng, B, T, V)
    logits[..., -1] = -np.inf
    return Batch(mask, valid, tokens, targets, logits, *-np.exp(floats(rng, 3, B, T)))
