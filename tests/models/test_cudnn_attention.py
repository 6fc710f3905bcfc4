"""Attention by cuDNN: the same path through JAX's other implementation, and the program for CUDA.

No test runs the kernel itself.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from rlhf_jax.batches import TextBatch
from rlhf_jax.errors import InputError
from rlhf_jax.models import attention, cudnn_attention
from rlhf_jax.models.attention_mask import AttentionMask, attention_mask
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.cudnn_attention import attend_by_cudnn, check_device
from rlhf_jax.models.gpt2 import GPT2, Block, GPT2Config
from rlhf_jax.models.interface import SharedPrompt
from rlhf_jax.runtime.compilation.flops import count_flops
from rlhf_jax.training import sft

SIZES = GPT2Config(
    vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0
)
MODEL = GPT2(SIZES, "bfloat16", attention="cudnn")
ROWS, LENGTH, PAST = 4, 7, 3
POSITIONS = jnp.zeros((1, 1), jnp.int32)  # which GPT-2 does not read in its layers
MASKS = {
    # Padded right and left, packed, and all padding, whose tokens see nothing.
    "texts": np.array([[1] * 4 + [0] * 3, [0] * 3 + [1] * 4, [1, 1, 1, 2, 2, 3, 0], [0] * 7]),
    # A prompt of 3 and two responses of 2.
    "shared prompt": np.array([[1] * 7, [0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1, 0], [0] * 7]),
    # Two sequences behind each past.
    "behind a past": np.tri(ROWS, LENGTH, 2),
}


def mask_of(kind, mask):
    if kind == "shared prompt":
        return attention_mask(mask, None, SharedPrompt(PAST, 2))
    if kind == "behind a past":
        seen = jnp.array([[False, True, True], [False] * 3])
        return attention_mask(mask, Cache(None, None, seen, PAST), None)
    return attention_mask(mask, None, None)


@pytest.fixture(scope="module")
def arrays():
    block, random = Block(SIZES, "float32"), np.random.default_rng(0)
    x = random.normal(size=(ROWS, LENGTH, SIZES.n_embd)).astype(np.float32)
    visible = AttentionMask(jnp.ones((ROWS, 1, LENGTH, LENGTH), bool))
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, visible, POSITIONS))
    params = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32) / 4, shapes)
    memory = random.normal(size=(2, ROWS // 2, 2, PAST, 8)).astype(np.float32)
    return params, x, tuple(memory), random.normal(size=x.shape).astype(np.float32)


@pytest.mark.newest
@pytest.mark.parametrize("kind", MASKS)
def test_a_block_and_its_gradients_are_those_of_our_attention(kind, arrays, monkeypatch):
    params, x, memory, weights = arrays
    is_behind = kind == "behind a past"
    x, memory = (x.reshape(2, -1, SIZES.n_embd), memory) if is_behind else (x, None)
    visible = mask_of(kind, jnp.asarray(MASKS[kind], jnp.int32))
    through_xla = functools.partial(attend_by_cudnn, implementation="xla")
    monkeypatch.setattr(attention, "attend_by_cudnn", through_xla)

    def run(implementation):
        block = Block(SIZES, "float32", attention=implementation)

        def loss(params, x, memory):
            y, _ = block.apply(params, x, visible, POSITIONS, memory)
            return jnp.sum(y * weights.reshape(y.shape)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, x, memory)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        run("cudnn"),
        run("blocks"),
    )


@pytest.fixture
def cuda(monkeypatch):
    """As far as a program is only written for it."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn_attention, "check_device", lambda name: None)


def kernels(function, *arguments):
    """cuDNN's kernels in the program for CUDA, in their order, and its products' FLOPs."""
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"@__cudnn\$fmha(\w+)", text), count_flops(traced.jaxpr)


def traced_sft(model, settings):
    """A step of supervised fine-tuning, and the shapes of its arguments."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    init = functools.partial(sft.init_state, model, settings=settings, key=jax.random.key(0))
    state = jax.eval_shape(lambda key: init(model.init(key)), key)
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    batch = TextBatch(tokens, tokens, jax.ShapeDtypeStruct(tokens.shape, bool), tokens)
    return sft.make_step(model, settings), state, batch, key


def test_a_training_step_for_cuda_has_the_kernel_once_each_way(cuda):
    """With `dots`, the output of attention is kept: its kernel is not run again."""
    names, _ = kernels(*traced_sft(MODEL, sft.Settings(batch_size=2, dropout=False)))
    assert names == ["ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"]


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("full", 2)])
def test_the_flops_of_the_kernel_are_counted(cuda, remat, forward):
    q = jax.ShapeDtypeStruct((2, 1, 2, LENGTH, 8), jnp.bfloat16)
    visible = jax.ShapeDtypeStruct((2, 1, LENGTH, LENGTH), bool)

    def loss(q, k, v, visible):
        body = lambda q, k, v: attend_by_cudnn(q, k, v, visible)  # noqa: E731
        body = jax.checkpoint(body, prevent_cse=False) if remat == "full" else body
        return jnp.sum(body(q, k, v).astype(jnp.float32) ** 2)

    names, flops = kernels(jax.grad(loss, (0, 1, 2)), q, q, q, visible)
    assert names == ["ScaleBiasSoftmax"] * forward + ["ScaleBiasSoftmaxBackward"]
    # 2 sequences and heads, 8 wide; an even number of tokens, each seeing those before it.
    product = 2 * 2 * 2 * 8 * (8 * 9 // 2)
    assert flops == (2 * forward + 5) * product


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention": "flash"}, "model.attention must be blocks or cudnn, but is 'flash'"),
        ({"dtype": "float32"}, "needs the dtype bfloat16 or float16, but it is float32; set"),
        ({"config": dataclasses.replace(SIZES, n_embd=12)}, "a multiple of 8 and at most 128, but"),
        ({"config": dataclasses.replace(SIZES, n_embd=512)}, "at most 128, but it is 256; set"),
    ],
)
def test_settings_without_a_kernel_are_refused_with_the_model(changed, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MODEL, **changed)


def test_dropout_of_weights_is_refused_and_other_dropout_allowed(cuda):
    others = dataclasses.replace(SIZES, resid_pdrop=0.1, embd_pdrop=0.1)
    settings = sft.Settings(batch_size=2, dropout=True)
    step, *arguments = traced_sft(dataclasses.replace(MODEL, config=others), settings)
    jax.eval_shape(step, *arguments)
    weights = dataclasses.replace(MODEL, config=dataclasses.replace(SIZES, attn_pdrop=0.1))
    with pytest.raises(InputError, match=r"drops no weights, .* attn_pdrop = 0\.1; train without"):
        traced_sft(weights, settings)


class Device:
    def __init__(self, platform, kind, capability=None):
        self.platform, self.device_kind = platform, kind
        if capability is not None:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (Device("cpu", "cpu"), "^X needs an NVIDIA GPU, but JAX runs on cpu; set model.attention"),
        (Device("gpu", "MI300", "gfx942"), "but JAX runs on MI300"),
        (Device("gpu", "Tesla T4", "7.5"), r"capability 8\.0 or more, but Tesla T4 has 7\.5; set"),
        (Device("gpu", "H100", "9.0"), None),
        (Device("gpu", "B300", "10.3"), None),
    ],
    ids=lambda value: getattr(value, "device_kind", ""),
)
def test_devices_without_the_kernel_are_named(device, message, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    if message is None:
        check_device("X")
        return
    with pytest.raises(InputError, match=message):
        check_device("X")


def test_without_a_gpu_a_step_says_so():
    with pytest.raises(InputError, match="The attention cudnn needs an NVIDIA GPU, but JAX runs"):
        jax.eval_shape(lambda: MODEL.hidden(MODEL.init(jax.random.key(0)), jnp.ones((1, 4), int)))
