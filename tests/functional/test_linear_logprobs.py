"""Log-probabilities from hidden states: against those from logits, and how much they hold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rlhf
from rlhf_jax.functional import linear

B, T, D, V = 3, 7, 6, 11
# Without a soft-cap, and with one that bends the logits.
LIMITS = [{}, {"softcap": 2.0, "logit_scale": 0.6}]


@pytest.fixture
def inputs(rng):
    """(hidden, unembedding, temperature), tokens and cotangents of the two outputs."""
    hidden, unembedding = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    tokens = rng.integers(0, V, size=(B, T))
    arrays = (hidden.astype(np.float32), unembedding.astype(np.float32), np.float32(0.7))
    return arrays, tokens, rng.normal(size=(2, B, T)).astype(np.float32)


def from_logits(hidden, unembedding, tokens, temperature, softcap=None, logit_scale=1.0):
    """Both outputs by way of an array of all logits."""
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    logits *= logit_scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits /= temperature
    return rlhf.token_logprobs(logits, tokens), rlhf.token_entropy(logits)


def gradients(function, inputs, used=(0, 1), **options):
    """((outputs), (gradients)) where the loss reads the outputs that `used` names."""
    arrays, tokens, cotangents = inputs

    def loss(arrays):
        hidden, unembedding, temperature = arrays
        outputs = function(hidden, unembedding, tokens, temperature=temperature, **options)
        return sum(jnp.vdot(cotangents[i], outputs[i]) for i in used), outputs

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs, gradients


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_values_and_gradients_are_those_from_logits(inputs, used, chunk_size):
    expected = gradients(from_logits, inputs, used)
    actual = gradients(rlhf.linear_token_logprobs, inputs, used, chunk_size=chunk_size)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_gradients_pass_through_the_softcap_to_all_that_it_reads(inputs, used, chunk_size):
    (hidden, unembedding, temperature), tokens, cotangents = inputs

    def loss(function, arrays, **options):
        hidden, unembedding, temperature, softcap, scale = arrays
        scalars = {"temperature": temperature, "softcap": softcap, "logit_scale": scale}
        outputs = function(hidden, unembedding, tokens, **scalars, **options)
        return sum(jnp.vdot(cotangents[i], outputs[i]) for i in used)

    arrays = (hidden, unembedding, temperature, np.float32(2.0), np.float32(0.6))
    expected = jax.grad(loss, 1)(from_logits, arrays)
    actual = jax.grad(loss, 1)(rlhf.linear_token_logprobs, arrays, chunk_size=chunk_size)
    assert min(np.abs(x).max() for x in jax.tree.leaves(expected)) > 0.01
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_values_are_those_of_a_loop(inputs, chunk_size, limits):
    (hidden, unembedding, temperature), tokens, _ = inputs
    logprobs, entropy = rlhf.linear_token_logprobs(
        hidden, unembedding, tokens, temperature=temperature, chunk_size=chunk_size, **limits
    )
    for b, t in np.ndindex(B, T):
        logits = np.array([np.float64(row) @ hidden[b, t] for row in unembedding])
        if limits:  # first scaled, then bounded, as in transformers; the temperature divides last
            logits = 2.0 * np.tanh(0.6 * logits / 2.0)
        logits /= temperature
        p = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(logprobs[b, t], np.log(p[tokens[b, t]]), rtol=1e-5)
        np.testing.assert_allclose(entropy[b, t], -np.sum(p * np.log(p)), rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize(("chunk_size", "limits"), [(None, {}), (3, {}), (None, LIMITS[1])])
def test_padding_of_the_vocabulary_has_no_effect(inputs, chunk_size, garbage, limits):
    (hidden, unembedding, temperature), tokens, cotangents = inputs
    padding = np.full((5, D), garbage, np.float32)
    padded = ((hidden, np.concatenate([unembedding, padding]), temperature), tokens, cotangents)
    outputs, (for_hidden, for_unembedding, _) = gradients(
        rlhf.linear_token_logprobs, padded, chunk_size=chunk_size, vocab_size=V, **limits
    )
    expected, expected_gradients = gradients(rlhf.linear_token_logprobs, inputs, **limits)
    chex.assert_trees_all_close(outputs, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(for_hidden, expected_gradients[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(for_unembedding[:V], expected_gradients[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(for_unembedding[V:], 0)


def test_padding_below_all_other_logits_does_not_underflow_them():
    hidden, unembedding = np.ones((1, 1, 1), np.float32), np.float32([[-1e4], [-1e4], [0]])
    logprobs, entropy = rlhf.linear_token_logprobs(
        hidden, unembedding, np.zeros((1, 1), int), vocab_size=2
    )
    np.testing.assert_allclose([logprobs[0, 0], entropy[0, 0]], np.log([0.5, 2.0]), rtol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("limits", LIMITS)
def test_positions_that_nothing_reads_are_inert(inputs, ragged_mask, chunk_size, garbage, limits):
    (hidden, unembedding, temperature), tokens, cotangents = inputs
    mask = ragged_mask[:B]
    poisoned = np.where(mask[..., None], hidden, garbage).astype(np.float32)
    tokens = np.where(mask, tokens, -100)
    results = []
    for filled in (hidden, poisoned):

        def loss(hidden, unembedding, temperature):
            outputs = rlhf.linear_token_logprobs(
                hidden,
                unembedding,
                tokens,
                temperature=temperature,
                chunk_size=chunk_size,
                **limits,
            )
            kept = [jnp.where(mask, x, 0) for x in outputs]
            return sum(jnp.vdot(a, x) for a, x in zip(cotangents, kept, strict=True))

        results.append(jax.value_and_grad(loss, (0, 1, 2))(filled, unembedding, temperature))
    chex.assert_tree_all_finite(results[1])
    chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize("token", [-1, V, -100])
def test_a_token_outside_the_vocabulary_is_nan(inputs, token):
    (hidden, unembedding, _), _, _ = inputs
    padded = np.concatenate([unembedding, unembedding])
    tokens = np.full((B, T), token)
    logprobs, entropy = rlhf.linear_token_logprobs(hidden, padded, tokens, vocab_size=V)
    assert np.isnan(logprobs).all()
    assert np.isfinite(entropy).all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_extreme_logits_have_finite_values_and_gradients(inputs, scale, chunk_size):
    (hidden, unembedding, temperature), tokens, cotangents = inputs
    large = (scale * hidden, unembedding, temperature)
    expected = gradients(from_logits, (large, tokens, cotangents))
    actual = gradients(
        rlhf.linear_token_logprobs, (large, tokens, cotangents), chunk_size=chunk_size
    )
    chex.assert_tree_all_finite(actual)
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    # Differences of logits of 1e5 keep two digits after the point.
    chex.assert_trees_all_close(actual[1], expected[1], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("chunk_size", "limits"), [(None, {}), (3, {}), (3, LIMITS[1])])
def test_bfloat16_products_are_summed_in_float32(inputs, chunk_size, limits):
    (hidden, unembedding, temperature), tokens, cotangents = inputs
    halved = tuple(jnp.asarray(x, jnp.bfloat16) for x in (hidden, unembedding))
    widened = tuple(np.asarray(x, np.float32) for x in halved)
    outputs, (for_hidden, for_unembedding, _) = gradients(
        rlhf.linear_token_logprobs,
        ((*halved, temperature), tokens, cotangents),
        chunk_size=chunk_size,
        **limits,
    )
    expected, expected_gradients = gradients(
        rlhf.linear_token_logprobs, ((*widened, temperature), tokens, cotangents), **limits
    )
    chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-5)
    for gradient, wide in zip((for_hidden, for_unembedding), expected_gradients, strict=False):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(gradient), wide, atol=0.02 * np.abs(wide).max())


def gradient_of_sum(function, **options):
    def total(hidden, unembedding, tokens):
        logprobs, entropy = function(hidden, unembedding, tokens, **options)
        return jnp.sum(logprobs) + 0.01 * jnp.sum(entropy)

    return jax.jit(jax.value_and_grad(total, (0, 1)))


def temporary_bytes(function, shape, **options):
    b, t, d, v = shape
    hidden = jax.ShapeDtypeStruct((b, t, d), jnp.float32)
    unembedding = jax.ShapeDtypeStruct((v, d), jnp.float32)
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    lowered = gradient_of_sum(function, **options).lower(hidden, unembedding, tokens)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_the_logits_of_gpt2_take_an_eighth_of_the_memory_by_default():
    shape = (8, 1024, 768, 50257)
    plain = temporary_bytes(
        lambda hidden, unembedding, tokens: from_logits(hidden, unembedding, tokens, 1.0), shape
    )
    assert temporary_bytes(rlhf.linear_token_logprobs, shape) <= plain / 8


def test_logits_are_saved_if_they_fit_and_recomputed_if_not(monkeypatch):
    # Products take 2 * B * T * V * D operations each: three of them, or four.
    shape = {"hidden": (2, 64, 32), "unembedding": (512, 32)}
    product = 2 * 2 * 64 * 512 * 32
    counts = {}
    for limit in (2**30, 2**10):
        monkeypatch.setattr(linear, "MAX_SAVED", limit)
        monkeypatch.setattr(linear, "CHUNK", 2 * 64 * 512 * 4 // 2)
        arrays = {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in shape.items()}
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        jaxpr = jax.make_jaxpr(gradient_of_sum(rlhf.functional.linear_token_logprobs))(
            arrays["hidden"], arrays["unembedding"], tokens
        )
        counts[limit] = products(jaxpr.jaxpr) / product
    assert counts == {2**30: 3, 2**10: 4}


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_all_products_take_the_dtype_given(chunk_size):
    hidden, unembedding = jnp.ones((2, 64, 8), jnp.bfloat16), jnp.ones((32, 8), jnp.bfloat16)
    step = gradient_of_sum(rlhf.functional.linear_token_logprobs, chunk_size=chunk_size)
    jaxpr = jax.make_jaxpr(step)(hidden, unembedding, jnp.zeros((2, 64), int)).jaxpr
    operands = {str(x.aval.dtype) for each in products_in(jaxpr) for x in each.invars}
    assert operands == {"bfloat16"}
    assert {str(each.outvars[0].aval.dtype) for each in products_in(jaxpr)} == {"float32"}


def inner(equation):
    """The jaxprs that an equation runs."""
    result = [getattr(x, "jaxpr", x) for x in equation.params.values()]
    return [x for x in result if hasattr(x, "eqns")]


def products_in(jaxpr):
    """The equations of all matrix products, once each."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for each in inner(equation):
            yield from products_in(each)


def products(jaxpr):
    """Floating-point operations of all matrix products, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * out.size * int(np.prod([lhs.shape[i] for i in contracted]))
        total += equation.params.get("length", 1) * sum(map(products, inner(equation)))
    return total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "^chunk_size must be a whole number from 1 on, but is 0."),
        ({"chunk_size": True}, "^chunk_size must be a whole number from 1 on, but is True."),
        ({"temperature": np.ones(11)}, "^temperature must be a single number, but is float64"),
        ({"chunk_size": 2.0}, "^chunk_size must be a whole number from 1 on, but is 2.0."),
        ({"vocab_size": 12}, "^vocab_size must be a whole number from 1 on and at most V = 11, "),
        ({"vocab_size": 0}, "^vocab_size must be .*but is 0."),
    ],
)
def test_wrong_sizes_are_named(inputs, options, message):
    (hidden, unembedding, _), tokens, _ = inputs
    with pytest.raises(ValueError, match=message):
        rlhf.functional.linear_token_logprobs(hidden, unembedding, tokens, **options)


def test_an_unembedding_of_another_width_is_named(inputs):
    (hidden, unembedding, _), tokens, _ = inputs
    with pytest.raises(ValueError, match=r"^unembedding must be float\[V, D\] with D = 6, but is "):
        rlhf.functional.linear_token_logprobs(hidden, unembedding[:, 1:], tokens)
