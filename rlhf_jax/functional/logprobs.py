"""Log-probabilities of tokens, and entropies of their distributions."""

import functools
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from rlhf_jax.functional.expect import expect, expect_scalars
from rlhf_jax.functional.normalizer import MIN_LOGPROB, entropy_of, normalizer

# Bytes of logits on one device: up to MAX_SAVED they are computed at once and saved for the
# backward pass; beyond it they are computed in chunks of about CHUNK bytes, in both passes.
MAX_SAVED = 2**30
CHUNK = 2**27


def token_logprobs(logits, tokens):
    """Log-probability of each token under the softmax of its logits.

        logits[token] - log sum_v exp(logits[v])

    Args:
      logits: float[..., V]. A logit of -inf has probability 0, and gradients are finite. If one is
        NaN or inf, or all are -inf, the log-probability is NaN and the gradient 0, so that a mask
        can exclude such padding later.
      tokens: int[...]; a token below 0, or V and above, gives NaN.

    Returns:
      f32[...] in nats.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(token_logprobs(jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([1])))
    [-0.6931472]
    """
    expect(logits=(logits, "...V", float), tokens=(tokens, "...", int))
    tokens = tokens.astype(jnp.int32)
    logprobs = _chosen_logprobs(logits.astype(jnp.float32), tokens)
    is_known = (tokens >= 0) & (tokens < logits.shape[-1])
    return jnp.where(is_known, logprobs, jnp.nan)


@jax.custom_jvp
def _chosen_logprobs(logits, tokens):
    """f32[...] of f32[..., V] logits; NaN where they do not define a distribution."""
    top, log_total = normalizer(logits)
    return chosen_logits(logits, tokens) - top - log_total


@_chosen_logprobs.defjvp
def _chosen_logprobs_jvp(primals, tangents):
    """d logp = d logit_token - sum_v p_v d logit_v, with one exponential per logit."""
    logits, tokens = primals
    top, log_total = normalizer(logits)
    # Two differences: the sum of top and log_total would round log_total off beside large logits.
    probabilities = jnp.exp((logits - top[..., None]) - log_total[..., None])
    slope = (_token_ids(logits) == tokens[..., None]) - probabilities
    slope = jnp.where(jnp.isfinite(log_total)[..., None], slope, 0.0)
    return chosen_logits(logits, tokens) - top - log_total, jnp.sum(slope * tangents[0], axis=-1)


def chosen_logits(logits, tokens):
    """f32[...]: the logit of each token."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take_along_axis(logits, tokens[..., None], axis=-1, mode="clip")[..., 0]
    # A gather would all-gather a vocabulary that is sharded over devices.
    return jnp.sum(jnp.where(_token_ids(logits) == tokens[..., None], logits, 0.0), axis=-1)


def token_entropy(logits):
    """Entropy of the softmax of the logits.

        H = log sum_v exp(logits[v]) - sum_v p[v] logits[v]

    Args:
      logits: float[..., V]. A logit of -inf has probability 0, and gradients are finite. If one is
        NaN or inf, or all are -inf, the entropy is NaN and the gradient 0.

    Returns:
      f32[...] in nats, from 0 to log V.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    >>> print(token_entropy(jnp.array([[0.0, 0.0, -jnp.inf]])))
    [0.6931472]
    """
    expect(logits=(logits, "...V", float))
    return _entropy(logits.astype(jnp.float32))


@jax.custom_jvp
def _entropy(logits):
    return entropy_of(logits)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    """dH = -sum_v p_v (log p_v + H) d logit_v."""
    (logits,) = primals
    entropy, (top, log_total) = entropy_of(logits), normalizer(logits)
    logp = (logits - top[..., None]) - log_total[..., None]
    # 0 * -inf is NaN.
    slope = -jnp.exp(logp) * (jnp.maximum(logp, MIN_LOGPROB) + entropy[..., None])
    slope = jnp.where(jnp.isfinite(log_total)[..., None], slope, 0.0)
    return entropy, jnp.sum(slope * tangents[0], axis=-1)


def shift_logits(logits):
    """(shifted, is_distribution): logits in float32 minus their maximum, for precision.

    0 where the maximum is not finite, since a gradient of 0 times NaN is NaN.
    """
    logits = logits.astype(jnp.float32)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    is_distribution = jnp.isfinite(top)
    return jnp.where(is_distribution, logits - top, 0.0), is_distribution[..., 0]


def linear_token_logprobs(
    hidden, unembedding, tokens, *, temperature=1.0, chunk_size=None, vocab_size=None
):
    """Log-probabilities of tokens and entropies of their distributions, from hidden states.

        logits_t = unembedding @ hidden_t / temperature
        logprobs = token_logprobs(logits, tokens),     entropy = token_entropy(logits)

    In chunks, logits are computed, used and freed, and computed again in the backward pass: memory
    holds f32[B, chunk_size, V] instead of f32[B, T, V]. If all logits fit in one chunk, they are
    saved and not recomputed. Products take the dtypes of the inputs and accumulate in float32. A
    position whose outputs are not used contributes 0 to every gradient, even if it holds NaN.
    Supports first-order reverse-mode derivatives.

    Args:
      hidden: float[B, T, D], the hidden state from which each token is predicted.
      unembedding: float[V, D].
      tokens: int[B, T]; a token below 0, or vocab_size and above, gives NaN.
      temperature: divisor of the logits, above 0.
      chunk_size: number of positions of each sequence per chunk, static. None: all positions if
        their logits take at most 1 GiB on a device, otherwise as many as take 128 MiB, but at least
        one. The devices are those of `jax.set_mesh`, over which logits are assumed to be sharded;
        an axis of `jax.vmap` is not counted, so give a number there. If the batch is sharded, each
        chunk sums the unembedding's gradient over devices; inside `jax.shard_map` there is one sum.
      vocab_size: number of rows of the unembedding that are tokens, static; None: all. Further rows
        are padding and have no effect.

    Returns:
      (logprobs, entropy), f32[B, T] each, in nats.

    Raises:
      ValueError: naming the argument whose shape, dtype or size is wrong.

    Computing logits in chunks, and again in the backward pass: Wijmans et al., Cut Your Losses in
    Large-Vocabulary Language Models, section 4 (arXiv:2411.09009).

    >>> hidden, unembedding = jnp.ones([1, 2, 3]), jnp.array([[0.0, 0, 0], [1, 1, 1]])
    >>> logprobs, entropy = linear_token_logprobs(
    ...     hidden, unembedding, jnp.array([[0, 1]]), temperature=3.0)
    >>> print(jnp.exp(logprobs), f"{entropy[0, 0]:.3f}")
    [[0.26894143 0.7310586 ]] 0.582
    """
    expect(
        hidden=(hidden, "BTD", float),
        tokens=(tokens, "BT", int),
        unembedding=(unembedding, "VD", float),
    )
    expect_scalars(temperature=temperature)
    (batch, length, _), num_rows = hidden.shape, unembedding.shape[0]
    if chunk_size is None:
        chunk_size = _chunk_size(batch, length, num_rows)
    chunk_size = _expect_positive("chunk_size", chunk_size, math.inf)
    vocab_size = num_rows if vocab_size is None else vocab_size
    vocab_size = _expect_positive("vocab_size", vocab_size, num_rows)
    chunks = max(1, math.ceil(length / chunk_size))
    arrays = (hidden, unembedding, tokens.astype(jnp.int32), jnp.asarray(temperature, jnp.float32))
    return _outputs(*_varying_alike(arrays), chunks, vocab_size)


class _Normalizers(NamedTuple):
    """The normalizers of a position's logits, and its entropy; f32[B, t] each.

    log p_v = (logits_v - top) / temperature - log_total
    """

    top: jax.Array
    log_total: jax.Array
    entropy: jax.Array


def _chunk_size(batch, length, num_rows):
    mesh = jax.sharding.get_abstract_mesh()
    # Inside shard_map sizes are those of one device already.
    manual = jax.sharding.AxisType.Manual
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True) if not mesh.empty else ()
    devices = math.prod(size for size, kind in axes if kind != manual)
    position = 4 * batch * num_rows / devices
    return max(1, length if length * position <= MAX_SAVED else int(CHUNK / position))


def _expect_positive(name, number, highest):
    is_integer = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not (is_integer and 1 <= number <= highest):
        limit = "" if highest == math.inf else f" and at most V = {highest}"
        raise ValueError(f"{name} must be a whole number from 1 on{limit}, but is {number!r}.")
    return int(number)


def _varying_alike(arrays):
    """The arrays cast to vary over the same mesh axes, inside `jax.shard_map`.

    Gradients of a custom rule must vary over the same axes as their arrays. A replicated array is
    cast, and the gradient of the cast is the sum over devices.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    lacking = [tuple(sorted(frozenset().union(*varying) - axes)) for axes in varying]
    return [
        lax.pcast(x, lack, to="varying") if lack else x
        for x, lack in zip(arrays, lacking, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(hidden, unembedding, tokens, temperature, chunks, vocab_size):
    return _results(hidden, unembedding, tokens, temperature, chunks, vocab_size)[0]


def _forward(hidden, unembedding, tokens, temperature, chunks, vocab_size):
    hidden, unembedding, tokens, temperature = (
        x.value for x in (hidden, unembedding, tokens, temperature)
    )
    arrays = (hidden, unembedding, tokens, temperature)
    outputs, *saved = _results(*arrays, chunks, vocab_size)
    return outputs, (*arrays, *saved)


def _results(hidden, unembedding, tokens, temperature, chunks, vocab_size):
    """((logprobs, entropy), normalizers, logits if they are of one chunk)."""
    weights = _without_padding(unembedding, vocab_size)

    def read(_, chunk):
        logits = _logits(chunk[0], weights)
        outputs, normalizers = _read(logits, chunk[1], temperature, vocab_size)
        return None, (outputs, normalizers, logits if chunks == 1 else ())

    return _scan(read, None, (hidden, tokens), chunks)[1]


def _backward(chunks, vocab_size, saved, gradients):
    hidden, unembedding, tokens, temperature, normalizers, logits = saved
    weights = _without_padding(unembedding, vocab_size)
    # An unused output has no gradient, instead of zeros that would have to be multiplied.
    gradients = tuple(None if isinstance(g, SymbolicZero) else g for g in gradients)
    is_used = functools.reduce(jnp.logical_or, [g != 0 for g in gradients if g is not None])
    hidden = jnp.where(is_used[..., None], hidden, 0)

    def add(total, chunk):
        hidden, tokens, normalizers, gradients, is_used, logits = chunk
        if chunks > 1:
            logits = _logits(hidden, weights)
        gradient = _logit_gradients(logits, tokens, normalizers, gradients, temperature)
        is_token = _token_ids(logits) < vocab_size
        gradient = jnp.where(is_used[..., None] & is_token, gradient, 0.0).astype(
            jnp.promote_types(hidden.dtype, weights.dtype)
        )
        hidden_grad = _product("btv,vd->btd", gradient, weights, like=hidden)
        # [D, V] and not [V, D], which transposes hidden instead of the logits.
        return total + _product("btd,btv->dv", hidden, gradient, like=total), hidden_grad

    zeros = jnp.zeros_like(unembedding.T, jnp.float32)
    arrays = (hidden, tokens, normalizers, gradients, is_used, logits)
    unembedding_grad, hidden_grad = _scan(add, zeros, arrays, chunks)
    # The logits are linear in hidden / temperature.
    temperature_grad = -jnp.sum(hidden.astype(jnp.float32) * hidden_grad) / temperature
    hidden_grad = hidden_grad.astype(hidden.dtype)
    if unembedding.dtype != jnp.float32:
        # Fused with the product, the transposition gives one that XLA lacks for bfloat16 on CPUs.
        unembedding_grad = lax.optimization_barrier(unembedding_grad)
    return hidden_grad, unembedding_grad.T.astype(unembedding.dtype), None, temperature_grad


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
# Under jit, because shard_map outside of jit does not accept symbolic zeros.
_outputs = jax.jit(_chunked, static_argnums=(4, 5))


def _product(axes, x, y, like=None):
    """The product in float32, with the sharding of `like` if mesh axes are explicit."""
    sharding = None if like is None else jax.typeof(like).sharding
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32, out_sharding=sharding)


def _logits(hidden, weights):
    """f32[B, t, V], before the division by the temperature."""
    return _product("btd,vd->btv", hidden, weights)


def _without_padding(unembedding, vocab_size):
    """The unembedding with its padding rows replaced by its first row.

    This does not change the largest logit, and removes NaN, which times a gradient of 0 is NaN.
    """
    num_rows = unembedding.shape[0]
    if vocab_size == num_rows:
        return unembedding
    ids = lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
    # A sum and not [:1], which cannot slice a vocabulary that is sharded over devices.
    first = jnp.sum(jnp.where(ids == 0, unembedding, 0), axis=0, keepdims=True)
    return jnp.where(ids < vocab_size, unembedding, first)


def _token_ids(logits):
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _read(logits, tokens, temperature, vocab_size):
    """((logprobs, entropy), normalizers) of f32[B, t, V]."""
    ids = _token_ids(logits)
    top = jnp.max(logits, axis=-1)
    shifted = (logits - top[..., None]) / temperature
    weights = jnp.where(ids < vocab_size, jnp.exp(shifted), 0.0)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    entropy = log_total - jnp.sum(weights * shifted, axis=-1) / total
    chosen = jnp.sum(jnp.where(ids == tokens[..., None], shifted, 0.0), axis=-1)
    chosen = jnp.where((tokens >= 0) & (tokens < vocab_size), chosen, jnp.nan)
    return (chosen - log_total, entropy), _Normalizers(top, log_total, entropy)


def _logit_gradients(logits, tokens, normalizers, gradients, temperature):
    """The gradient of the logits, from those of logprobs and entropy.

    d logp_token / d logit_v = ([v = token] - p_v) / temperature
    d entropy / d logit_v    = -p_v * (log p_v + entropy) / temperature
    """
    logprobs_grad, entropy_grad = (
        None if g is None else (g / temperature)[..., None] for g in gradients
    )
    top, log_total, entropy = (x[..., None] for x in normalizers)
    logp = (logits - top) / temperature - log_total
    slope = 0.0 if logprobs_grad is None else logprobs_grad
    if entropy_grad is not None:
        slope += entropy_grad * (logp + entropy)
    gradient = -jnp.exp(logp) * slope
    if logprobs_grad is None:
        return gradient
    return gradient + jnp.where(_token_ids(logits) == tokens[..., None], logprobs_grad, 0.0)


def _scan(body, carry, arrays, chunks):
    """lax.scan over `chunks` chunks of [B, T, ...] along T; its outputs are concatenated."""
    if chunks == 1:
        return body(carry, arrays)
    length = jax.tree.leaves(arrays)[0].shape[1]
    size = math.ceil(length / chunks)

    def split(x):
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, chunks * size - length)
        x = jnp.pad(x, padding).reshape(x.shape[0], chunks, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * size, *x.shape[3:])[:, :length]

    carry, outputs = lax.scan(body, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, outputs)
