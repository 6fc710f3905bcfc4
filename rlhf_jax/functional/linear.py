"""Log-probabilities of tokens from hidden states, without an array of all logits."""

import functools
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from rlhf_jax.functional.expect import expect, expect_scalars
from rlhf_jax.functional.logprobs import token_ids

# Bytes of logits on one device: up to MAX_SAVED they are computed at once and saved for the
# backward pass; beyond it they are computed in chunks of about CHUNK bytes, in both passes.
MAX_SAVED = 2**30
CHUNK = 2**27


def linear_token_logprobs(
    hidden,
    unembedding,
    tokens,
    *,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    chunk_size=None,
    vocab_size=None,
):
    """Log-probabilities of tokens and entropies of their distributions, from hidden states.

        x_t      = logit_scale * unembedding @ hidden_t
        y_t      = softcap * tanh(x_t / softcap),     x_t without softcap
        logits_t = y_t / temperature
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
      temperature: divisor of the logits, above 0; after scale and soft-cap, as in sampling.
      softcap: limits logits to (-softcap, softcap), as `final_logit_softcapping` of Gemma 2 does;
        above 0. None: no limit.
      logit_scale: factor of the products, before the soft-cap; above 0. Granite's `logits_scaling`
        divides them: logit_scale = 1 / logits_scaling.
      chunk_size: number of positions of each sequence per chunk, static. None: all positions if
        their logits take at most 1 GiB on a device, otherwise as many as take 128 MiB, but at least
        one. The devices are those of `jax.set_mesh`, over which logits are assumed to be sharded;
        an axis of `jax.vmap` is not counted, so give a number there. If the batch is sharded, each
        chunk sums the unembedding's gradient over devices; inside `jax.shard_map` there is one sum.
      vocab_size: number of tokens, static; None: V. Vectors of the unembedding from there on are
        padding and have no effect.

    Returns:
      (logprobs, entropy), f32[B, T] each, in nats.

    Raises:
      ValueError: naming the argument whose shape, dtype or size is wrong.

    Computing logits in chunks, and again in the backward pass: Wijmans et al., Cut Your Losses in
    Large-Vocabulary Language Models, section 4 (arXiv:2411.09009). Soft-capping: Gemma Team,
    Gemma 2, section 2 (arXiv:2408.00118).

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
    expect_scalars(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    (batch, length, _), padded_size = hidden.shape, unembedding.shape[0]
    if chunk_size is None:
        is_small = length * _position_bytes(batch, padded_size) <= MAX_SAVED
        chunk_size = max(length, 1) if is_small else positions_per_chunk(batch, length, padded_size)
    chunks, vocab_size = expect_sizes(length, padded_size, chunk_size, vocab_size)
    # With c = softcap / logit_scale: softcap * tanh(x / softcap) = logit_scale * c * tanh(... / c).
    temperature = jnp.asarray(temperature / logit_scale, jnp.float32)
    softcap = None if softcap is None else jnp.asarray(softcap / logit_scale, jnp.float32)
    arrays = (hidden, unembedding, tokens.astype(jnp.int32), temperature, softcap)
    return _outputs(*varying_alike(arrays), chunks, vocab_size)


class _Normalizers(NamedTuple):
    """The normalizers of a position's logits, and its entropy; f32[B, t] each.

    log p_v = (logits_v - top) / temperature - log_total
    """

    top: jax.Array
    log_total: jax.Array
    entropy: jax.Array


def positions_per_chunk(batch, length, padded_size):
    """Positions whose logits take about CHUNK bytes on a device: from 1 to half of the length."""
    fitting = int(CHUNK / _position_bytes(batch, padded_size))
    return max(1, min(fitting, -(-length // 2)))


def _position_bytes(batch, padded_size):
    """Bytes on one device of the logits of one position of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside shard_map sizes are those of one device already.
    manual = jax.sharding.AxisType.Manual
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True) if not mesh.empty else ()
    devices = math.prod(size for size, kind in axes if kind != manual)
    return max(4 * batch * padded_size / devices, 1)


def expect_sizes(length, padded_size, chunk_size, vocab_size):
    """(number of chunks, vocab_size), after a check of both sizes."""
    chunk_size = _expect_positive("chunk_size", chunk_size, math.inf)
    vocab_size = padded_size if vocab_size is None else vocab_size
    return max(1, -(-length // chunk_size)), _expect_positive("vocab_size", vocab_size, padded_size)


def _expect_positive(name, number, highest):
    is_integer = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not (is_integer and 1 <= number <= highest):
        limit = "" if highest == math.inf else f" and at most V = {highest}"
        raise ValueError(f"{name} must be a whole number from 1 on{limit}, but is {number!r}.")
    return int(number)


def varying_alike(arrays):
    """A pytree of arrays, cast to vary over the same mesh axes inside `jax.shard_map`.

    Gradients of a custom rule must vary over the same axes as their arrays. A replicated array is
    cast, and the gradient of the cast is the sum over devices.
    """
    leaves, structure = jax.tree.flatten(arrays)
    varying = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    lacking = [tuple(sorted(frozenset().union(*varying) - axes)) for axes in varying]
    pairs = zip(leaves, lacking, strict=True)
    cast = [lax.pcast(x, lack, to="varying") if lack else x for x, lack in pairs]
    return jax.tree.unflatten(structure, cast)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _chunked(hidden, unembedding, tokens, temperature, softcap, chunks, vocab_size):
    return _results(hidden, unembedding, tokens, temperature, softcap, chunks, vocab_size)[0]


def _forward(hidden, unembedding, tokens, temperature, softcap, chunks, vocab_size):
    is_frozen = not unembedding.perturbed
    arrays = [x and x.value for x in (hidden, unembedding, tokens, temperature, softcap)]
    hidden, unembedding, tokens, temperature, softcap = arrays
    results = _results(hidden, unembedding, tokens, temperature, softcap, chunks, vocab_size)
    outputs, *saved = results
    # A pytree and not a bool: what is saved are arrays.
    return outputs, (arrays, None if is_frozen else (), *saved)


def _results(hidden, unembedding, tokens, temperature, softcap, chunks, vocab_size):
    """((logprobs, entropy), normalizers, products if they are of one chunk)."""
    weights = without_padding(unembedding, vocab_size)

    def read(_, chunk):
        products = product("btd,vd->btv", chunk[0], weights)
        logits = products if softcap is None else softcap * jnp.tanh(products / softcap)
        outputs, normalizers = _read(logits, chunk[1], temperature, vocab_size)
        return None, (outputs, normalizers, products if chunks == 1 else ())

    return scan_chunks(read, None, (hidden, tokens), chunks)[1]


def _backward(chunks, vocab_size, saved, gradients):
    (hidden, unembedding, tokens, temperature, softcap), trained, normalizers, products = saved
    weights = without_padding(unembedding, vocab_size)
    # An unused output has no gradient, instead of zeros that would have to be multiplied.
    gradients = tuple(None if isinstance(g, SymbolicZero) else g for g in gradients)
    is_used = functools.reduce(jnp.logical_or, [g != 0 for g in gradients if g is not None])
    hidden = jnp.where(is_used[..., None], hidden, 0)

    def add(totals, chunk):
        hidden, tokens, normalizers, gradients, is_used, logits = chunk
        if chunks > 1:
            logits = product("btd,vd->btv", hidden, weights)
        reads = is_used[..., None] & (token_ids(logits) < vocab_size)
        gradient, parts = _product_gradients(
            logits, softcap, reads, tokens, normalizers, gradients, temperature
        )
        gradient = gradient.astype(jnp.promote_types(hidden.dtype, weights.dtype))
        hidden_grad = product("btv,vd->btd", gradient, weights, like=hidden)
        weights_grad = None
        if trained is not None:
            # [D, V] and not [V, D], which transposes hidden instead of the logits.
            weights_grad = product("btd,btv->dv", hidden, gradient, like=totals[0])
        return jax.tree.map(jnp.add, totals, (weights_grad, parts)), hidden_grad

    zero = jnp.zeros_like(temperature)
    zeros = None if trained is None else jnp.zeros_like(unembedding.T, jnp.float32)
    totals = (zeros, None if softcap is None else (zero, zero))
    arrays = (hidden, tokens, normalizers, gradients, is_used, products)
    (weights_grad, parts), hidden_grad = scan_chunks(add, totals, arrays, chunks)
    if parts is None:
        # The logits are linear in hidden / temperature.
        parts = (jnp.sum(hidden.astype(jnp.float32) * hidden_grad), None)
    hidden_grad = hidden_grad.astype(hidden.dtype)
    temperature_grad = -parts[0] / temperature
    if weights_grad is not None:
        weights_grad = transposed(weights_grad, unembedding.dtype)
    return hidden_grad, weights_grad, None, temperature_grad, parts[1]


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
# Under jit, because shard_map outside of jit does not accept symbolic zeros.
_outputs = jax.jit(_chunked, static_argnums=(5, 6))


def product(axes, x, y, like=None):
    """The product in float32, with the sharding of `like` if mesh axes are explicit."""
    sharding = None if like is None else jax.typeof(like).sharding
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32, out_sharding=sharding)


def transposed(gradient, dtype):
    """[V, D] in a dtype, of f32[D, V]."""
    if dtype != jnp.float32:
        # Fused with the product, the transposition gives one that XLA lacks for bfloat16 on CPUs.
        gradient = lax.optimization_barrier(gradient)
    return gradient.T.astype(dtype)


def without_padding(unembedding, vocab_size):
    """The unembedding with its padding replaced by its first vector.

    This does not change the largest logit, and removes NaN, which times a gradient of 0 is NaN.
    """
    padded_size = unembedding.shape[0]
    if vocab_size == padded_size:
        return unembedding
    ids = lax.broadcasted_iota(jnp.int32, (padded_size, 1), 0)
    # A sum and not [:1], which cannot slice a vocabulary that is sharded over devices.
    first = jnp.sum(jnp.where(ids == 0, unembedding, 0), axis=0, keepdims=True)
    return jnp.where(ids < vocab_size, unembedding, first)


def _read(logits, tokens, temperature, vocab_size):
    """((logprobs, entropy), normalizers) of f32[B, t, V]."""
    ids = token_ids(logits)
    top = jnp.max(logits, axis=-1)
    shifted = (logits - top[..., None]) / temperature
    weights = jnp.where(ids < vocab_size, jnp.exp(shifted), 0.0)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    entropy = log_total - jnp.sum(weights * shifted, axis=-1) / total
    chosen = jnp.sum(jnp.where(ids == tokens[..., None], shifted, 0.0), axis=-1)
    chosen = jnp.where((tokens >= 0) & (tokens < vocab_size), chosen, jnp.nan)
    return (chosen - log_total, entropy), _Normalizers(top, log_total, entropy)


def _product_gradients(products, softcap, reads, tokens, normalizers, gradients, temperature):
    """(gradient of the products, parts of the gradients of temperature and soft-cap).

    With y = c tanh(x / c) and t = tanh(x / c): dy/dx = 1 - t^2, dy/dc = t - (x / c) (1 - t^2). The
    gradient of the temperature is minus the first part, sum_v y_v dL/dy_v, over the temperature.
    """
    if softcap is None:
        gradient = _logit_gradients(products, tokens, normalizers, gradients, temperature)
        return jnp.where(reads, gradient, 0.0), None
    ratio = jnp.where(reads, products, 0.0) / softcap
    bounded = jnp.tanh(ratio)
    arrays = (tokens, normalizers, gradients, temperature)
    gradient = jnp.where(reads, _logit_gradients(softcap * bounded, *arrays), 0.0)
    slope = (1.0 - bounded) * (1.0 + bounded)
    for_softcap = jnp.sum(gradient * (bounded - ratio * slope))
    return gradient * slope, (jnp.sum(gradient * bounded) * softcap, for_softcap)


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
    return gradient + jnp.where(token_ids(logits) == tokens[..., None], logprobs_grad, 0.0)


def scan_chunks(body, carry, arrays, chunks):
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
