"""Loops, collectives and memory traffic, read off the text of compiled programs."""

import re

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.rollout.generation import generate
from rlhf_jax.runtime.compilation import hlo
from rlhf_jax.runtime.compilation.chips import CHIPS, roofline
from rlhf_jax.runtime.compilation.collectives import collectives
from rlhf_jax.runtime.compilation.flops import count_flops
from rlhf_jax.runtime.compilation.traffic import bytes_moved
from rlhf_jax.training import sft

# As a compiler for TPUs writes it: a loop whose count is not printed, in steps of two and from one
# on; a gather that begins before the loop and is waited for inside it; a scatter behind a sum; and
# a value that stays on the chip.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%begin (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=\
mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, config={"async_collective_fusion":1}
}

%wait (q: bf16[4,8]) -> bf16[16,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[16,8]{1,0} all-gather(%q), channel_id=1, replica_groups=\
mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, config={"async_collective_fusion":1}
}

%all-reduce-scatter.3 (r: f32[16,8]) -> f32[4,8] {
  %r = f32[16,8]{1,0} parameter(0)
  %reduce.3 = f32[16,8]{1,0} all-reduce(%r), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = f32[4,8]{1,0} dynamic-slice(%reduce.3, %zero, %zero), dynamic_slice_sizes={4,8}
}

%condition (c: (s32[], bf16[4,8], f32[16,8])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %bound = s32[]{:T(128)} constant(8)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (s: (s32[], bf16[4,8], f32[16,8])) -> (s32[], bf16[4,8], f32[16,8]) {
  %s = (s32[]{:T(128)}, /*index=1*/bf16[4,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%s), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%j, %two)
  %w = bf16[4,8]{1,0} get-tuple-element(%s), index=1
  %x = f32[16,8]{1,0} get-tuple-element(%s), index=2
  %waited = bf16[16,8]{1,0:T(8,128)S(1)} fusion(%w), kind=kLoop, calls=%wait
  %scattered = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%w), \
channel_id=4, source_target_pairs={{0,1},{1,0}}
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  ROOT %carry = (s32[]{:T(128)}, bf16[4,8]{1,0}, f32[16,8]{1,0}) tuple(%next, %done, %x)
}

ENTRY %main (p0: bf16[4,8], p1: f32[16,8]) -> f32[16,8] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = f32[16,8]{1,0} parameter(1)
  %one = s32[] constant(1)
  %begun = bf16[16,8]{1,0} fusion(%p0), kind=kCustom, calls=%begin
  %init = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) tuple(%one, %p0, %p1)
  %loop = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) while(%init), condition=%condition, body=%body
  %alone = f32[16,8]{1,0} all-reduce(%p1), channel_id=9, replica_groups={{0},{1}}, to_apply=%add
  ROOT %out = f32[16,8]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_collectives_of_a_text_count_as_often_as_they_run():
    found = {each.kind: each for each in collectives(hlo.parse(TEXT), 8)}
    sizes = {kind: (e.times, e.group, e.size, e.total) for kind, e in found.items()}
    assert sizes == {
        "all-gather": (1, 4, 256, 192.0),  # 3 / 4 of its result, once
        "reduce-scatter": (4, 4, 128, 4 * 3 * 128.0),  # from 1 to 8 by 2
        "collective-permute": (4, 2, 64, 4 * 64.0),
    }
    assert found["collective-permute"].shape == "bf16[4,8]"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{}", 8),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
    ],
)
def test_groups_are_read_in_every_form(groups, size):
    line = f"  ROOT %x = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to=%a"
    text = f"ENTRY %m (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n{line}\n}}"
    (found,) = collectives(hlo.parse(text), 8)
    assert (found.group, found.received) == (size, 2 * 32 * (size - 1) / size)


def loops(text):
    """The counts of all loops of a program."""
    module = hlo.parse(text)
    return sorted(
        hlo.trip_count(module, computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    )


def nested(x):
    def inner(x, _):
        return jnp.sin(x @ x), None

    def outer(x, _):
        return jax.lax.scan(inner, x, length=5)[0], None

    return jax.lax.scan(outer, x, length=3)[0]


def test_counts_of_loops_are_those_of_the_scans_printed_or_not():
    text = jax.jit(nested).lower(jnp.ones((64, 64))).compile().as_text()
    assert loops(text) == [3, 5]
    assert loops(re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)) == [3, 5]
    assert count_flops(jax.make_jaxpr(nested)(jnp.ones((64, 64)))) == 15 * 2 * 64**3


def test_without_loops_bytes_are_those_of_the_compiler():
    def f(x, y):
        return jax.nn.softmax(x @ y), (x @ y).sum()

    compiled = jax.jit(f).lower(jnp.ones((128, 256)), jnp.ones((256, 512))).compile()
    theirs = compiled.cost_analysis()
    theirs = theirs[0] if isinstance(theirs, list) else theirs
    assert bytes_moved(hlo.parse(compiled.as_text())) == pytest.approx(
        theirs["bytes accessed"], rel=0.05
    )


def test_a_layer_reads_its_own_part_of_stacked_parameters():
    def f(stack, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, stack)[0]

    layers, width = 64, 128
    args = jnp.ones((layers, width, width)), jnp.ones((8, width))
    moved = bytes_moved(hlo.parse(jax.jit(f).lower(*args).compile().as_text()))
    whole = layers * width * width * 4
    assert whole < moved < 6 * whole  # all of it once, and copies; not 64 times


MODEL = GPT2(GPT2Config(vocab_size=60, n_positions=16, n_embd=8, n_layer=3, n_head=2), remat="none")


def test_flops_of_training_are_three_times_those_of_a_hand_count():
    settings = sft.Settings(batch_size=4, dropout=False)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: sft.init_state(MODEL, MODEL.init(key), settings, key))
    tokens = jnp.zeros((4, 16), jnp.int32)
    batch = sft.TextBatch(tokens, tokens, tokens > 0)
    found = count_flops(jax.make_jaxpr(sft.make_step(MODEL, settings))(state, batch, key))
    rows, length, width = 4, 16, 8
    layer = 2 * rows * length * 12 * width**2
    attention = 2 * rows * length**2 * width  # one of two products forwards and five backwards
    logits = 2 * rows * (length - 1) * 128 * width  # the vocabulary is padded
    biases = 2 * rows * length * 9 * width  # on one CPU their gradients are products with ones
    assert found == 3 * (3 * layer + logits + biases) + 3 * 7 * attention


def test_flops_of_decoding_count_every_step():
    prompts = jnp.ones((2, 4), jnp.int32)

    def f(params):
        mask = prompts > 0
        return generate(MODEL, params, prompts, mask, jax.random.key(0), max_new_tokens=8)

    found = count_flops(jax.make_jaxpr(f)(jax.eval_shape(MODEL.init, jax.random.key(0))))
    per_token = 2 * 2 * (3 * 12 * 8**2)
    logits = 2 * 2 * 128 * 8
    # Attention comes to it: of a decoded token to 11 places of the cache, its own among them.
    attention = 3 * 2 * 2 * (8 * 2 * 8 * 11 + 2 * 4 * 4 * 8)
    assert found == (4 + 8) * per_token + (1 + 8) * logits + attention


def test_the_slowest_peak_bounds_the_time():
    line = roofline(CHIPS["v5e"], flops=1.97e12, moved=819e9, received=100e9)
    assert (line.compute, line.memory, line.network) == pytest.approx((0.01, 1.0, 0.5))
    assert (line.bound, line.seconds) == ("memory", 1.0)
