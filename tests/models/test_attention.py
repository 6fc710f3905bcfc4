"""Attention against loops over tokens, values and gradients, in blocks and behind a past."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention
from rlhf_jax.models.attention import attend, attend_to_cache
from rlhf_jax.models.attention_mask import Past
from rlhf_jax.models.cudnn_attention import attend_by_cudnn
from rlhf_jax.models.dropout import kept, start_dropout

G, K, H, T, P, D = 2, 3, 2, 7, 5, 4


def by_loop(q, k, v, visible, past=None, keep=None, scale=1.0):
    """Each token by itself: the softmax of its products with the visible tokens."""
    out = np.zeros(q.shape)
    for g, i, h, t in np.ndindex(*q.shape[:4]):
        seen = [(k[g, i, h, m], v[g, i, h, m], m) for m in range(q.shape[3]) if visible[g, i, t, m]]
        if past is not None:
            mask = np.broadcast_to(past.mask, (*q.shape[:2], q.shape[3], P))
            places = np.nonzero(mask[g, i, t])[0]
            seen += [(past.keys[g, h, m], past.values[g, h, m], None) for m in places]
        if not seen:
            continue
        logits = np.array([q[g, i, h, t] @ key for key, _, _ in seen])
        weights = np.exp(logits - logits.max())
        for weight, (_, value, m) in zip(weights / weights.sum(), seen, strict=True):
            is_kept = keep is None or keep[g, i, h, t, m]
            out[g, i, h, t] += weight * value * scale * is_kept
    return out


def arrays(seed=0, length=T, count=K):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, G, count, H, length, D)).astype(np.float32)
    mask = rng.random((G, count, length)) < 0.7
    mask[0, 0] = False  # a sequence of padding, whose tokens see nothing
    visible = mask[..., None, :] & np.tri(length, dtype=bool)
    past = Past(
        *rng.normal(size=(2, G, H, P, D)).astype(np.float32), rng.random((G, 1, 1, P)) < 0.6
    )
    return q, k, v, visible, past


@pytest.fixture(params=[256, 3, 1], ids=lambda block: f"blocks of {block}")
def block(request, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", request.param)


@pytest.mark.parametrize("kind", ["alone", "behind a past", "with dropout"])
def test_grouped_heads_against_a_loop(block, kind):
    """Query head h reads key/value head h // 2; gradients are those of repeated ones, summed."""
    q, k, v, visible, past = arrays()
    q = np.concatenate([q, -q[:, :, ::-1]], axis=2)  # 4 heads on 2
    past = past if kind == "behind a past" else None
    dropout = start_dropout(jax.random.key(2), 0.2) if kind == "with dropout" else None
    repeated = [np.repeat(x, 2, axis=2) for x in (k, v)]
    full_past = past and Past(*(np.repeat(x, 2, axis=1) for x in past[:2]), past.mask)
    keep, scale = None, 1.0
    if dropout is not None:
        keep, scale = np.asarray(kept(dropout, (*q.shape[:4], T))), 1 / 0.8
    expected = by_loop(q, *repeated, visible, full_past, keep, scale)
    actual = jax.jit(attend)(q, k, v, visible, past, dropout)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    if dropout is None:
        through_xla = functools.partial(attend_by_cudnn, implementation="xla")
        actual = jax.jit(through_xla)(q, k, v, visible, past)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    def loss(q, k, v, past, of):
        return jnp.sum(jnp.sin(of(q, k, v, visible, past, dropout)))

    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3), allow_int=True), static_argnums=4)
    ones, alls = grad(q, k, v, past, attend), grad(q, *repeated, full_past, plain)
    np.testing.assert_allclose(ones[0], alls[0], rtol=1e-4, atol=1e-5, err_msg="q")
    for index, name in ((1, "k"), (2, "v")):
        summed = alls[index].reshape(*k.shape[:2], 2, 2, *k.shape[3:]).sum(axis=3)
        np.testing.assert_allclose(ones[index], summed, rtol=1e-4, atol=1e-5, err_msg=name)
    if past is not None:
        for name in ("keys", "values"):
            summed = getattr(alls[3], name).reshape(G, 2, 2, P, D).sum(axis=2)
            actual = getattr(ones[3], name)
            np.testing.assert_allclose(actual, summed, rtol=1e-4, atol=1e-5, err_msg=name)


def test_grouped_heads_on_a_cache_against_a_loop():
    q, k, v, visible, _ = arrays(count=1)
    q = np.concatenate([q, -q[:, :, ::-1]], axis=2)[:, 0, :, 2:5]  # [G, 4, 3, D]
    k, v, visible = k[:, 0], v[:, 0], visible[:, 0, 2:5]
    visible |= np.eye(3, T, dtype=bool)
    actual = jax.jit(attend_to_cache)(q, k, v, visible)
    for g, h, t in np.ndindex(*q.shape[:3]):
        logits = np.where(visible[g, t], k[g, h // 2] @ q[g, h, t], -np.inf)
        weights = np.exp(logits - logits.max())
        expected = weights @ v[g, h // 2] / weights.sum()
        np.testing.assert_allclose(actual[g, h, t], expected, rtol=1e-4, atol=1e-5)


def plain(q, k, v, visible, past=None, dropout=None, *, softcap=None):
    """The same with all weights at once, for JAX to differentiate."""

    def capped(logits):
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    logits = capped(jnp.einsum("gkhtd,gkhmd->gkhtm", q, k))
    logits = jnp.where(visible[:, :, None], logits, -1e9)
    if past is not None:
        before = capped(jnp.einsum("gkhtd,ghmd->gkhtm", q, past.keys))
        before = jnp.where(past.mask[:, :, None], before, -1e9)
        logits = jnp.concatenate([logits, before], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    own = weights[..., : k.shape[3]]
    if dropout is not None:
        own = jnp.where(kept(dropout, own.shape), own * dropout.scale, 0.0)
    out = jnp.einsum("gkhtm,gkhmd->gkhtd", own, v)
    if past is not None:
        out += jnp.einsum("gkhtm,ghmd->gkhtd", weights[..., k.shape[3] :], past.values)
        sees = visible.any(-1) | past.mask.any(-1)
    else:
        sees = visible.any(-1)
    return jnp.where(sees[:, :, None, :, None], out, 0.0)


KINDS = ("alone", "behind a past", "behind a past in a window")


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_tokens(block, kind):
    q, k, v, visible, past = arrays()
    past = past_of(kind, past, T)
    actual = jax.jit(lambda *args: attend(*args))(q, k, v, visible, past)
    np.testing.assert_allclose(actual, by_loop(q, k, v, visible, past), rtol=1e-5, atol=1e-6)


def past_of(kind, past, length):
    """The past of a kind: in a window, each token of each response sees places of its own."""
    if not kind.startswith("behind a past"):
        return None
    if "window" in kind:
        return past._replace(mask=np.random.default_rng(6).random((G, K, length, P)) < 0.4)
    return past


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kind", [*KINDS, "with dropout", "behind a past with other layouts"])
def test_gradients_equal_those_of_the_plain_formula(kind, softcap, length, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 3)
    if kind.endswith("with other layouts"):  # as on other devices
        monkeypatch.setattr(attention, "can_set_layouts", lambda: False)
    q, k, v, visible, past = arrays(1, length)
    past = past_of(kind, past, length)
    dropout = start_dropout(jax.random.key(2), 0.2) if kind == "with dropout" else None
    weights = np.random.default_rng(3).normal(size=q.shape).astype(np.float32)

    def loss(function):
        def of(q, k, v, memory):
            given = None if past is None else Past(*memory, past.mask)
            return jnp.sum(function(q, k, v, visible, given, dropout, softcap=softcap) * weights)

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2, 3)))

    memory = () if past is None else past[:2]
    actual, expected = loss(attend)(q, k, v, memory), loss(plain)(q, k, v, memory)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
    )


def test_invisible_keys_have_no_gradient():
    q, k, v, visible, past = arrays()
    unseen = ~visible.any(axis=2)
    grads = jax.grad(lambda k, v: jnp.sum(attend(q, k, v, visible, past) ** 2), (0, 1))(k, v)
    for grad in grads:
        assert not np.asarray(grad)[np.broadcast_to(unseen[:, :, None], k.shape[:4])].any()


def test_dropout_of_weights_equals_a_loop():
    q, k, v, visible, _ = arrays(4)
    dropout = start_dropout(jax.random.key(5), 0.5)
    keep = np.asarray(kept(dropout, (G, K, H, T, T)))
    actual = attend(q, k, v, visible, None, dropout)
    expected = by_loop(q, k, v, visible, None, keep, 2.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_past_has_no_dropout():
    q, k, v, visible, past = arrays()
    with pytest.raises(ValueError, match="no dropout"):
        attend(q, k, v, visible, past, start_dropout(jax.random.key(0), 0.5))


def test_bfloat16_is_near_float32():
    q, k, v, visible, past = arrays()

    @jax.jit
    def run(q, k, v, memory):
        def loss(q, k, v, memory):
            out = attend(q, k, v, visible, Past(*memory, past.mask))
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, memory)

    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (q, k, v, past[:2]))
    actual, expected = run(*half), run(q, k, v, past[:2])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(actual)} == {"bfloat16"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.1, atol=0.05),
        actual,
        expected,
    )


def test_attention_to_a_cache_equals_attention_to_a_sequence():
    q, k, v, visible, _ = arrays(6, count=1)
    visible[0] = visible[1]  # a query that sees nothing is no query of decoding
    visible |= np.eye(T, dtype=bool)
    actual = attend_to_cache(q[:, 0, :, -2:], k[:, 0], v[:, 0], visible[:, 0, -2:])
    np.testing.assert_allclose(
        actual, by_loop(q, k, v, visible)[:, 0, :, -2:], rtol=1e-5, atol=1e-6
    )
