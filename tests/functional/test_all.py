"""Properties of every public function."""

import doctest
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import functional
from tests.functional.case import SHARED, T, function_name, total_of
from tests.functional.cases import make_cases

CASES = make_cases(0)
LOSSES = [name for name in CASES if function_name(name).endswith("_loss")]
MASKED = [name for name, case in CASES.items() if case.masks]
TRACED = [(name, coefficient) for name, case in CASES.items() for coefficient in case.coefficients]

# Metrics that are not scalars, but one number per pair.
PER_EXAMPLE = {"chosen_end_scores", "rejected_end_scores"}


def function_of(name, module=functional):
    return getattr(module, function_name(name))


def call(function, case, arrays, **keywords):
    return function(**arrays, **case.options, **{**case.coefficients, **keywords})


@functools.cache
def plain(name):
    """The outputs of a case, operation by operation."""
    return call(function_of(name), CASES[name], CASES[name].arrays)


@functools.cache
def compiled(name):
    """(arrays, **keywords) -> outputs and gradients of `total_of` them, for one case.

    Coefficients are always traced, so that one program serves all tests.
    """
    case, function = CASES[name], function_of(name)
    coefficients = {key: np.float32(value) for key, value in case.coefficients.items()}

    def total(differentiable, arrays, keywords):
        output = call(function, case, {**arrays, **differentiable}, **keywords)
        return total_of(output), output

    def outputs(arrays, **keywords):
        differentiable = {key: arrays[key] for key in case.differentiable}
        if not differentiable:
            return total({}, arrays, keywords)[1], {}
        gradients, output = jax.grad(total, has_aux=True)(differentiable, arrays, keywords)
        return output, gradients

    jitted = jax.jit(outputs)
    return lambda arrays, **keywords: jitted(arrays, **{**coefficients, **keywords})


def float_arrays(case):
    return {name: x for name, x in case.arrays.items() if x.dtype == np.float32}


def test_every_function_but_those_of_scalars_has_a_case():
    of_scalars = {"adaptive_kl_update", "penalty_kl_update"}
    assert set(functional.__all__) - set(map(function_name, CASES)) == of_scalars


@pytest.mark.parametrize("name", functional.__all__)
def test_the_compiled_function_has_the_signature_and_docstring_of_the_plain_one(name):
    plain, compiled = getattr(functional, name), getattr(rlhf_jax, name)
    assert compiled is not plain
    assert hasattr(compiled, "lower"), "not compiled"
    assert inspect.signature(compiled) == inspect.signature(plain)
    assert compiled.__doc__ == plain.__doc__
    assert getattr(rlhf_jax, name) is compiled


def test_the_names_of_rlhf_jax_are_those_of_functional():
    assert set(rlhf_jax.__all__) == {"__version__", "functional", *functional.__all__}
    assert set(rlhf_jax.__all__) <= set(dir(rlhf_jax))
    assert rlhf_jax.functional is functional
    with pytest.raises(AttributeError, match="module 'rlhf_jax' has no attribute 'gea'"):
        rlhf_jax.gea  # noqa: B018


@pytest.mark.newest
@pytest.mark.parametrize("name", functional.__all__)
def test_the_docstring_has_an_example_that_the_compiled_function_fulfils(name):
    names = {**vars(rlhf_jax), "jnp": jnp}
    test = doctest.DocTestParser().get_doctest(getattr(rlhf_jax, name).__doc__, names, name, "", 0)
    assert test.examples
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


@pytest.mark.newest
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_plain_with_one_trace_whatever_the_coefficients(name):
    compiled, counts = function_of(name, rlhf_jax), []
    for seed, scale in ((0, 1.0), (1, 0.5)):
        case = make_cases(seed)[name]
        coefficients = {key: scale * value for key, value in case.coefficients.items()}
        jitted = call(compiled, case, case.arrays, **coefficients)
        counts.append(compiled._cache_size())
        expected = call(function_of(name), case, case.arrays, **coefficients)
        chex.assert_trees_all_close(jitted, expected, rtol=1e-5, atol=1e-6)
    assert counts[0] == counts[1]


@pytest.mark.newest
@pytest.mark.parametrize("name", CASES)
def test_vmap_over_arrays_and_coefficients_equals_a_loop(name):
    arrays = [make_cases(seed)[name].arrays for seed in (0, 1)]
    scaled = [
        {key: np.float32(scale * value) for key, value in CASES[name].coefficients.items()}
        for scale in (0.5, 1.5)
    ]
    stacked, coefficients = (
        jax.tree.map(lambda *x: np.stack(x), *each) for each in (arrays, scaled)
    )
    mapped = jax.vmap(lambda arrays, scaled: compiled(name)(arrays, **scaled))(
        stacked, coefficients
    )
    looped = [compiled(name)(*each[:1], **each[1]) for each in zip(arrays, scaled, strict=True)]
    looped = jax.tree.map(lambda *x: np.stack(x), *looped)
    chex.assert_trees_all_close(mapped, looped, rtol=1e-5, atol=1e-6)


@pytest.mark.newest
@pytest.mark.parametrize(("name", "coefficient"), TRACED)
def test_vmap_over_a_coefficient_alone(name, coefficient):
    """Its values are those of the test above; here one batched number meets unbatched arrays."""
    case = CASES[name]
    values = np.float32([0.5, 1.0, 1.5]) * case.coefficients[coefficient]

    def outputs(value):
        return compiled(name)(case.arrays, **{coefficient: value})

    mapped = jax.eval_shape(jax.vmap(outputs), values)
    single = jax.eval_shape(outputs, values[0])
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), single)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), mapped) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


@pytest.mark.newest
@pytest.mark.parametrize("name", [name for name in CASES if float_arrays(CASES[name])])
def test_bfloat16_is_read_and_float32_returned(name):
    case = CASES[name]
    halved = {key: jnp.asarray(x, jnp.bfloat16) for key, x in float_arrays(case).items()}
    widened = {key: np.asarray(x, np.float32) for key, x in halved.items()}
    output, gradients = compiled(name)({**case.arrays, **halved})
    expected, _ = compiled(name)({**case.arrays, **widened})
    assert {x.dtype for x in jax.tree.leaves(output)} <= {jnp.dtype("float32"), jnp.dtype("bool")}
    assert {x.dtype for x in gradients.values()} <= {jnp.dtype("bfloat16")}
    chex.assert_trees_all_close(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.newest
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MASKED)
def test_padding_changes_neither_values_nor_gradients(name, garbage):
    case = CASES[name]
    poisoned = dict(case.arrays)
    for key, mask_name in case.masks.items():
        x, mask = case.arrays[key], case.arrays[mask_name]
        filler = garbage if x.dtype == np.float32 else -100
        mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        poisoned[key] = np.where(mask, x, filler).astype(x.dtype)
        assert np.any(poisoned[key] != x)
    # Plain, operation by operation: compiled, a product with the mask would be taken for a `where`.
    chex.assert_trees_all_equal(plain(name), call(function_of(name), case, poisoned))
    output, gradients = compiled(name)(case.arrays)
    assert all(np.isfinite(x).all() for x in gradients.values())
    assert all(np.any(x != 0) for x in gradients.values())
    chex.assert_trees_all_equal(compiled(name)(poisoned), (output, gradients))


@pytest.mark.parametrize("name", MASKED)
def test_an_empty_mask_yields_zeros(name):
    case = CASES[name]
    nothing = {key: np.zeros_like(case.arrays[key]) for key in set(case.masks.values())}
    for x in jax.tree.leaves(compiled(name)({**case.arrays, **nothing})):
        np.testing.assert_array_equal(x, np.zeros_like(x))


def assert_all_finite(output, gradients):
    # What is impossible has log-probability -inf, and a finite gradient.
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(output))
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("name", CASES)
def test_extreme_inputs_have_finite_gradients(name, scale):
    case = CASES[name]
    # The logit of an impossible token stays what it is.
    extreme = {
        key: np.where(np.isinf(x), x, np.float32(scale) * x)
        for key, x in float_arrays(case).items()
    }
    assert_all_finite(*compiled(name)({**case.arrays, **extreme}))


@pytest.mark.parametrize("value", [0.0, -3.0])
@pytest.mark.parametrize("name", CASES)
def test_identical_inputs_have_finite_gradients(name, value):
    case = CASES[name]
    identical = {key: np.full_like(x, value) for key, x in float_arrays(case).items()}
    assert_all_finite(*compiled(name)({**case.arrays, **identical}))


@pytest.mark.parametrize("name", MASKED)
def test_an_empty_response_has_finite_gradients(name):
    case = CASES[name]
    emptied = {key: case.arrays[key].copy() for key in set(case.masks.values())}
    for mask in emptied.values():
        mask[0] = False
    assert_all_finite(*compiled(name)({**case.arrays, **emptied}))


@pytest.mark.newest
@pytest.mark.parametrize("name", CASES)
def test_single_tokens_have_finite_gradients(name):
    case = CASES[name]
    single = {key: x[:, :1] if x.shape[1:2] == (T,) else x for key, x in case.arrays.items()}
    assert_all_finite(*compiled(name)(single))


@pytest.mark.parametrize("name", CASES)
def test_responses_of_no_length_are_no_error(name):
    case = CASES[name]
    empty = {key: x[:, :0] if x.shape[1:2] == (T,) else x for key, x in case.arrays.items()}
    output = jax.eval_shape(functools.partial(call, function_of(name), case), empty)
    assert {x.dtype for x in jax.tree.leaves(output)} <= {np.dtype("float32"), np.dtype("bool")}


def first_half(arrays):
    """The first two examples of a batch."""
    return {key: x[:2] if x.ndim and key not in SHARED else x for key, x in arrays.items()}


def second_half(arrays):
    return {key: x[2:] if x.ndim and key not in SHARED else x for key, x in arrays.items()}


@pytest.mark.newest
@pytest.mark.parametrize("name", [name for name in LOSSES if CASES[name].count])
def test_nothing_out_of_nothing_is_zero(name):
    case = CASES[name]
    arrays = first_half(case.arrays)
    nothing = {key: np.zeros_like(arrays[key]) for key in set(case.masks.values())}
    (loss, _), gradients = compiled(name)({**arrays, **nothing}, denominator=0.0)
    assert loss == 0
    assert not any(np.any(x) for x in gradients.values())


@pytest.mark.parametrize(
    ("name", "argument"), [*TRACED, *((name, "denominator") for name in LOSSES)]
)
def test_a_number_that_is_an_array_is_named(name, argument):
    case = CASES[name]
    with pytest.raises(ValueError, match=f"^{argument} must be (a single number|float|bool)"):
        call(function_of(name), case, case.arrays, **{argument: np.ones(3, np.float32)})


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_dtype_is_named_at_trace_time(name):
    other = {"float32": np.int32, "int32": np.float32, "bool": np.float32}
    case = CASES[name]
    batched = {key: x for key, x in case.arrays.items() if x.ndim}
    for key, x in batched.items():
        changed = {**case.arrays, key: np.zeros(x.shape, other[str(x.dtype)])}
        with pytest.raises(ValueError, match=rf"^{key} must be (float|int|bool)\["):
            jax.eval_shape(functools.partial(call, function_of(name), case), changed)


@pytest.mark.parametrize("name", CASES)
def test_unequal_shapes_are_named_at_trace_time(name):
    case = CASES[name]
    batched = {key: x for key, x in case.arrays.items() if x.ndim and key not in SHARED}
    for key, x in batched.items() if len(batched) > 1 else ():
        with pytest.raises(ValueError, match=r"^(\w+) must be .* with .*, but is "):
            jax.eval_shape(
                functools.partial(call, function_of(name), case),
                {**case.arrays, key: x[1:]},
            )


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_float32_scalar_with_flat_float32_metrics(name):
    (loss, metrics), _ = compiled(name)(CASES[name].arrays)
    for x in (loss, *(x for key, x in metrics.items() if key not in PER_EXAMPLE)):
        assert (x.shape, x.dtype) == ((), jnp.float32)


@pytest.mark.parametrize("name", [name for name in LOSSES if CASES[name].count])
def test_micro_batches_with_the_large_denominator_add_up(name):
    case = CASES[name]
    parts = [
        compiled(name)(half(case.arrays), denominator=case.count)
        for half in (first_half, second_half)
    ]
    (outputs, gradients) = zip(*parts, strict=True)
    full = compiled(name)(case.arrays)
    summed = jax.tree.map(lambda *x: sum(x), *map(scalars_of, outputs))
    joined = {
        key: sum(each[key] for each in gradients)
        if key in SHARED
        else np.concatenate([each[key] for each in gradients])
        for key in gradients[0]
    }
    chex.assert_trees_all_close(summed, scalars_of(full[0]), rtol=1e-5)
    chex.assert_trees_all_close(joined, full[1], rtol=1e-5, atol=1e-7)


def scalars_of(output):
    loss, metrics = output
    return loss, {key: x for key, x in metrics.items() if key not in PER_EXAMPLE}
