"""The loss of supervised fine-tuning, from logits or from hidden states."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from rlhf_jax.functional.expect import expect, expect_scalars
from rlhf_jax.functional.linear import (
    expect_sizes,
    positions_per_chunk,
    product,
    scan_chunks,
    transposed,
    varying_alike,
    without_padding,
)
from rlhf_jax.functional.logprobs import chosen_logits, token_ids, token_logprobs
from rlhf_jax.functional.masking import batch_mean, count_or_one


def cross_entropy_loss(logits, targets, mask, *, label_smoothing=0.0, z_loss=0.0, denominator=None):
    """Cross entropy of target tokens, a mean over real tokens.

        nll_t  = log Z_t - logits_t[target],     Z_t = sum_v exp(logits_t[v])
        loss_t = (1 - label_smoothing) * nll_t + label_smoothing * mean_v(log Z_t - logits_t[v])
                 + z_loss * (log Z_t)^2

    Args:
      logits: float[B, T, V]. A logit of -inf has probability 0 and is excluded from the smoothing.
      targets: int[B, T], the token that logits[b, t] predict: aligned, without a shift.
      mask: bool[B, T], True on real targets.
      label_smoothing: share of the weight that is uniform over all tokens.
      z_loss: weight of the squared log-normalizer, which limits the drift of logits.
      denominator: divisor of the sums, instead of the number of real tokens.

    Returns:
      (loss, metrics), f32[] each; metrics `nll`, in nats per token and without the extra terms,
      and `accuracy`, the share of targets with the largest logit. All are 0 if no token is real.

    Raises:
      ValueError: naming the argument whose shape or dtype is wrong.

    Label smoothing: Szegedy et al., section 7 (arXiv:1512.00567). z-loss: Chowdhery et al., PaLM,
    section 5 (arXiv:2204.02311).

    >>> logits, targets = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5]]])), jnp.array([[0, -100]])
    >>> loss, metrics = cross_entropy_loss(logits, targets, jnp.array([[True, False]]))
    >>> print(jnp.exp(-loss), metrics["accuracy"])
    0.75 1.0
    """
    expect(logits=(logits, "BTV", float), targets=(targets, "BT", int), mask=(mask, "BT", bool))
    expect_scalars(label_smoothing=label_smoothing, z_loss=z_loss)
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    targets = jnp.where(mask, targets.astype(jnp.int32), 0)
    nll = -token_logprobs(logits, targets)
    losses = nll
    # Terms with a weight of 0 are not computed: each reads all logits again.
    if not _is_zero(label_smoothing):
        # Not nll + s * (uniform - nll), which is NaN instead of inf for an impossible target.
        losses = (1.0 - label_smoothing) * nll + label_smoothing * _uniform_loss(logits)
    if not _is_zero(z_loss):
        losses += z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    correct = _is_first_largest(logits, targets)
    return batch_mean(losses, mask, denominator), {
        "nll": batch_mean(nll, mask, denominator),
        "accuracy": batch_mean(correct, mask, denominator),
    }


def linear_cross_entropy_loss(
    hidden,
    unembedding,
    targets,
    mask,
    *,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    chunk_size=None,
    vocab_size=None,
    denominator=None,
):
    """`cross_entropy_loss` from hidden states, without an array of all logits.

        x_t      = logit_scale * unembedding @ hidden_t
        logits_t = softcap * tanh(x_t / softcap),     x_t without softcap

    The loss is a sum over positions, so that the gradient of each chunk of them is computed right
    after its logits, in the forward pass, and the backward pass only multiplies it by a number:
    logits are computed once, and memory holds f32[B, chunk_size, V]. Products take the dtypes of
    the inputs and accumulate in float32. Supports first-order reverse-mode derivatives.

    Args:
      hidden: float[B, T, D], the hidden state from which each target is predicted.
      unembedding: float[V, D].
      targets, mask, label_smoothing, z_loss, denominator: as in `cross_entropy_loss`.
      softcap, logit_scale, vocab_size: as in `linear_token_logprobs`. A real target from vocab_size
        on has probability 0, and the loss is inf.
      chunk_size: number of positions of each sequence per chunk, static. None: as many as have
        logits of 128 MiB on a device, but at least one and at most half of T.

    Returns:
      (loss, metrics) as `cross_entropy_loss`; the metrics have no gradient.

    Raises:
      ValueError: naming the argument whose shape, dtype or size is wrong.

    >>> hidden, unembedding = jnp.ones([1, 2, 3]), jnp.array([[0.0, 0, 0], [1, 1, 1]])
    >>> targets, mask = jnp.array([[0, 1]]), jnp.array([[False, True]])
    >>> loss, metrics = linear_cross_entropy_loss(hidden, unembedding, targets, mask)
    >>> print(f"{jnp.exp(-loss):.4f}", metrics["accuracy"])
    0.9526 1.0
    """
    expect(
        hidden=(hidden, "BTD", float),
        targets=(targets, "BT", int),
        mask=(mask, "BT", bool),
        unembedding=(unembedding, "VD", float),
    )
    expect_scalars(label_smoothing=label_smoothing, z_loss=z_loss, denominator=denominator)
    expect_scalars(softcap=softcap, logit_scale=logit_scale)
    (batch, length, _), padded_size = hidden.shape, unembedding.shape[0]
    if chunk_size is None:
        chunk_size = positions_per_chunk(batch, length, padded_size)
    sizes = expect_sizes(length, padded_size, chunk_size, vocab_size)
    # None where a term does nothing, so that it is not computed.
    coefficients = (
        None if _is_zero(label_smoothing) else label_smoothing,
        None if _is_zero(z_loss) else z_loss,
        softcap,
        None if isinstance(logit_scale, int | float) and logit_scale == 1 else logit_scale,
    )
    coefficients = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), coefficients)
    hidden = jnp.where(mask[..., None], hidden, 0)
    arrays = (hidden, unembedding, targets.astype(jnp.int32), mask, coefficients)
    sums = _sums(*varying_alike(arrays), *sizes)
    divisor = count_or_one(jnp.sum(mask) if denominator is None else denominator)
    loss, nll, accuracy = (x / divisor for x in sums)
    return loss, {"nll": nll, "accuracy": accuracy}


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _linear_sums(hidden, unembedding, targets, mask, coefficients, chunks, vocab_size):
    """f32[] sums over real tokens: of losses, of nll, and the number of correct ones."""
    weights = without_padding(unembedding, vocab_size)

    def add(sums, chunk):
        products = product("btd,vd->btv", chunk[0], weights)
        _, targets, mask = chunk
        loss, metrics = _chunk_sums(products, coefficients, targets, mask, vocab_size)
        return jax.tree.map(jnp.add, sums, (loss, *metrics)), None

    zeros = (jnp.zeros_like(jnp.sum(mask), jnp.float32),) * 3
    return scan_chunks(add, zeros, (hidden, targets, mask), chunks)[0]


def _chunk_sums(products, coefficients, targets, mask, vocab_size):
    """(loss, (nll, correct)): sums over a chunk, of products f32[B, t, V]."""
    label_smoothing, z_loss, softcap, logit_scale = coefficients
    logits = products if logit_scale is None else logit_scale * products
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    if vocab_size < logits.shape[-1]:
        logits = jnp.where(token_ids(logits) < vocab_size, logits, -jnp.inf)
    terms = {
        "label_smoothing": 0.0 if label_smoothing is None else label_smoothing,
        "z_loss": 0.0 if z_loss is None else z_loss,
    }
    loss, metrics = cross_entropy_loss(logits, targets, mask, **terms, denominator=1.0)
    return loss, (metrics["nll"], metrics["accuracy"])


def _forward(hidden, unembedding, targets, mask, coefficients, chunks, vocab_size):
    """The sums, and the gradients of the first."""
    is_trained = unembedding.perturbed
    hidden, unembedding, targets, mask, coefficients = jax.tree.map(
        lambda x: x.value,
        (hidden, unembedding, targets, mask, coefficients),
        is_leaf=lambda x: hasattr(x, "perturbed"),
    )
    weights = without_padding(unembedding, vocab_size)

    def add(totals, chunk):
        hidden, targets, mask = chunk
        products = product("btd,vd->btv", hidden, weights)
        loss, pull, metrics = jax.vjp(
            lambda x, y: _chunk_sums(x, y, targets, mask, vocab_size),
            products,
            coefficients,
            has_aux=True,
        )
        gradient, for_coefficients = pull(jnp.ones_like(loss))
        gradient = gradient.astype(jnp.promote_types(hidden.dtype, weights.dtype))
        for_weights = None
        if is_trained:
            for_weights = product("btd,btv->dv", hidden, gradient, like=totals[1])
        parts = ((loss, *metrics), for_weights, for_coefficients)
        return jax.tree.map(jnp.add, totals, parts), product(
            "btv,vd->btd", gradient, weights, like=hidden
        )

    zeros = (jnp.zeros_like(jnp.sum(mask), jnp.float32),) * 3
    start = jnp.zeros_like(unembedding.T, jnp.float32) if is_trained else None
    totals = (zeros, start, jax.tree.map(jnp.zeros_like, coefficients))
    arrays = (hidden, targets, mask)
    (sums, *gradients), for_hidden = scan_chunks(add, totals, arrays, chunks)
    # Arrays without entries, for the dtypes.
    dtypes = [jnp.zeros(0, x.dtype) for x in (hidden, unembedding)]
    return sums, (for_hidden, *gradients, dtypes)


def _backward(chunks, vocab_size, saved, gradients):
    """The saved gradients times that of the sum of losses; the other sums are metrics."""
    del chunks, vocab_size
    for_hidden, for_weights, for_coefficients, (hidden, unembedding) = saved
    slope = gradients[0]
    if isinstance(slope, SymbolicZero):
        return None, None, None, None, None
    for_hidden = (slope * for_hidden).astype(hidden.dtype)
    if for_weights is not None:
        for_weights = transposed(slope * for_weights, unembedding.dtype)
    return for_hidden, for_weights, None, None, jax.tree.map(lambda x: slope * x, for_coefficients)


_linear_sums.defvjp(_forward, _backward, symbolic_zeros=True)
_sums = jax.jit(_linear_sums, static_argnums=(5, 6))


def _is_first_largest(logits, targets):
    """Whether argmax is the target, in a tenth of its time on a CPU; False if a logit is NaN."""
    is_known = (targets >= 0) & (targets < logits.shape[-1])
    chosen, targets = chosen_logits(logits, targets)[..., None], targets[..., None]
    is_before = token_ids(logits) < targets
    is_less = (logits < chosen) | (~is_before & (logits == chosen))
    return jnp.all(is_less, axis=-1) & is_known


def _uniform_loss(logits):
    """The cross entropy with a uniform target over all possible tokens."""
    possible = ~jnp.isneginf(logits)
    mean_logit = jnp.sum(jnp.where(possible, logits, 0.0), axis=-1) / jnp.sum(possible, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - mean_logit


def _is_zero(number):
    return isinstance(number, int | float) and number == 0
