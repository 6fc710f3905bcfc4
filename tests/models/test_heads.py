"""The linear heads: initial values and outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import apply_head, init_reward_head, init_value_head


def test_value_head_starts_at_zero():
    head = init_value_head(8)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in head.items()} == {
        "kernel": ((8,), jnp.float32),
        "bias": ((), jnp.float32),
    }
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 8))
    np.testing.assert_array_equal(apply_head(head, hidden), np.zeros((2, 3)))


def test_reward_head_has_the_published_scale_and_no_bias():
    head = init_reward_head(jax.random.key(0), 4000)
    assert set(head) == {"kernel"}
    assert head["kernel"].dtype == jnp.float32
    kernel = np.asarray(head["kernel"])
    assert np.std(kernel) == pytest.approx(4001**-0.5, rel=0.05)
    assert abs(np.mean(kernel)) < 4 * 4001**-0.5 / 4000**0.5
    other = init_reward_head(jax.random.key(1), 4000)
    assert not np.allclose(kernel, other["kernel"])


@pytest.mark.parametrize("bias", [None, 0.75])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_apply_head_is_a_float32_product(bias, dtype):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 64)), dtype)
    kernel = rng.normal(size=64).astype(np.float32)
    head = {"kernel": jnp.asarray(kernel)}
    if bias is not None:
        head["bias"] = jnp.float32(bias)
    values = apply_head(head, hidden)
    assert values.dtype == jnp.float32
    expected = np.zeros((2, 3))
    for b in range(2):
        for t in range(3):
            state = np.asarray(hidden[b, t].astype(jnp.float32), np.float64)
            expected[b, t] = sum(state * kernel) + (bias or 0.0)
    # A kernel rounded to bfloat16 would be off by about 1e-2.
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
