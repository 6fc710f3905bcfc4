"""cuDNN's attention on a mesh, by JAX's own rules for it, with XLA's arithmetic for the kernel.

Part of eight_devices.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir

from rlhf_jax.models import cudnn_attention
from rlhf_jax.models.attention_mask import Past
from rlhf_jax.models.cudnn_attention import attend_by_cudnn

SHAPES = set()  # of the queries, keys and masks that one device is given


def attend(q, k, v, bias, mask_type):
    """(the output, log Z) of [B, T, H, d] and [B, S, H, d]."""
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) + bias
    if mask_type.name == "CAUSAL":
        logits = jnp.where(jnp.tri(*logits.shape[2:], dtype=bool), logits, -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - total[..., None])
    return jnp.einsum("bhts,bshd->bthd", weights, v.astype(jnp.float32)).astype(q.dtype), total


def forward(q, k, v, bias, *_, mask_type, is_training, **__):
    """In place of the kernel."""
    SHAPES.add((q.shape, k.shape, bias.shape))
    return list(attend(q, k, v, bias, mask_type)[: 2 if is_training else 1])


def backward(q, k, v, bias, *others, variadic_args, mask_type, **_):
    """Likewise; the last of the others are log Z, the output, and its gradient.

    JAX 0.10 needs a gradient of the mask too.
    """
    log_total, out, gradient = others[6:9]
    assert log_total.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert out.shape == gradient.shape == q.shape
    _, pull = jax.vjp(lambda q, k, v: attend(q, k, v, bias, mask_type)[0], q, k, v)
    return [*pull(gradient), *([jnp.zeros_like(bias)] if variadic_args[1] else [])]


def check_split():
    """Each of 2 x 2 x 2 devices has a quarter of the batch and half of the heads, and no more."""
    for primitive, function in (
        (fused._dot_product_attention_fwd_p, forward),
        (fused._dot_product_attention_bwd_p, backward),
    ):
        lowered = mlir.lower_fun(function, multiple_results=True)
        mlir.register_lowering(primitive, lowered, platform="cpu")
    fused.check_cudnn_version = lambda: 91000
    cudnn_attention.check_device = lambda name: None
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(4, 2, 4, 6, 8)), jnp.bfloat16) for _ in range(3))
    memory = jnp.asarray(random.normal(size=(2, 4, 4, 2, 8)), jnp.bfloat16)
    visible = jnp.asarray(random.random((4, 2, 6, 6)) < 0.7) & jnp.tri(6, dtype=bool)

    def run(implementation):
        def loss(q, k, v, memory):
            past = Past(memory[0], memory[1], jnp.ones((4, 1, 1, 2), bool))
            both = (
                attend_by_cudnn(q, k, v, visible, each, implementation=implementation)
                for each in (None, past)
            )
            return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in both)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, memory)

    actual, expected = run("cudnn"), run("xla")
    assert {
        ((2, 6, 2, 8), (2, 6, 2, 8), (2, 1, 6, 6)),
        ((2, 6, 2, 8), (2, 8, 2, 8), (2, 1, 6, 8)),
    } == SHAPES
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=0.05 * np.abs(b).max())
