"""Checks cuDNN's attention against that of this library, on the device."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.attention import BLOCK, attend
from rlhf_jax.models.attention_mask import Past
from rlhf_jax.models.cudnn_attention import attend_by_cudnn
from scripts.benchmark.check import Difference, relative
from scripts.benchmark.settings import BenchmarkError

# Rounding to bfloat16 in another order changes numbers by a hundredth; a wrong mask or
# scale by more than a tenth.
LIMIT = 0.05
# Prompts G, responses to each K, heads H, positions of the past C, width of a head d.
PROMPTS, RESPONSES, HEADS, PAST, WIDTH = 3, 2, 2, 33, 64


def check_attention(implementation: Literal["cudnn", "xla"] = "cudnn") -> Difference:
    """The difference on padded and packed sequences of several blocks, and after a shared prompt.

    Args:
      implementation: an argument of `attend_by_cudnn`.

    Raises:
      BenchmarkError: a difference above 5e-2 of the largest number.
    """
    results = [_difference(length, implementation) for length in (BLOCK + 7, 5)]
    worst = Difference(
        f"attention {implementation}",
        max(values for values, _ in results),
        max(gradients for _, gradients in results),
    )
    if not max(worst.loss, worst.gradients) <= LIMIT:  # also for NaN
        raise BenchmarkError(
            f"the check of {worst.check} failed: it and its gradients differ from this "
            f"library's by {worst.loss:.1e} and {worst.gradients:.1e}, the limit is {LIMIT:.0e}; "
            "nothing was measured"
        )
    return worst


def _difference(length: int, implementation: Any) -> tuple[float, float]:
    """(difference of the outputs, of the gradients) for sequences of a length.

    Sequences of at most one block attend to a past too, as responses to a shared prompt do.
    """
    random, shape = np.random.default_rng(0), (PROMPTS, RESPONSES, HEADS, length, WIDTH)
    q, k, v, weights = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for _ in range(4))
    q *= jnp.asarray(WIDTH**-0.5, q.dtype)
    visible, memory = _visible(length), None
    if length <= BLOCK:
        memory = jnp.asarray(random.normal(size=(2, PROMPTS, HEADS, PAST, WIDTH)), jnp.bfloat16)
    mask = jnp.arange(PAST) >= jnp.array([[0], [20], [PAST]])

    def run(attention, **others):
        def loss(q, k, v, memory):
            past = None if memory is None else Past(memory[0], memory[1], mask[:, None, None])
            out = attention(q, k, v, visible, past, **others)
            return jnp.sum((out * weights).astype(jnp.float32)), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(
            q, k, v, memory
        )
        return out, grads

    ours, theirs = run(attend), run(attend_by_cudnn, implementation=implementation)
    return relative(theirs[0], ours[0]), relative(theirs[1], ours[1])


def _visible(length: int) -> jax.Array:
    """bool[G, K, T, T]: no padding, padding left and right, two packed texts, and padding alone."""
    index = np.arange(length)
    segments = np.stack(
        [
            index >= 0,
            index >= length // 3,
            index < length // 2,
            np.where(index < length // 3, 1, 2) * (index < length - 1),
            np.zeros(length, int),
            index >= 0,
        ]
    ).reshape(PROMPTS, RESPONSES, length)
    same = (segments[..., :, None] == segments[..., None, :]) & (segments[..., None, :] > 0)
    return jnp.asarray(same & np.tri(length, dtype=bool))
