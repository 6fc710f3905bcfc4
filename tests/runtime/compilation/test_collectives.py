"""Collectives and the runs of loops, read off the text of compiled programs."""

import re

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.runtime.compilation import collectives as hlo
from rlhf_jax.runtime.compilation.chips import CHIPS, least_seconds
from rlhf_jax.runtime.run.progress import PEAK_FLOPS

# As a compiler for TPUs writes it: a loop whose count is not printed; a gather that starts before
# the loop and is awaited inside it; and a scatter after a sum.
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
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%j, %one)
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
  %zero.1 = s32[] constant(0)
  %begun = bf16[16,8]{1,0} fusion(%p0), kind=kCustom, calls=%begin
  %init = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) tuple(%zero.1, %p0, %p1)
  %loop = (s32[], bf16[4,8]{1,0}, f32[16,8]{1,0}) while(%init), condition=%condition, body=%body
  %alone = f32[16,8]{1,0} all-reduce(%p1), channel_id=9, replica_groups={{0},{1}}, to_apply=%add
  ROOT %out = f32[16,8]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_collectives_of_a_text_count_as_often_as_they_run():
    found = {each.kind: each for each in hlo.collectives(TEXT, 8)}
    assert {kind: (each.times, each.group, each.total) for kind, each in found.items()} == {
        "all-gather": (1, 4, 16 * 8 * 2 * 3 / 4),
        "reduce-scatter": (8, 4, 8 * 4 * 8 * 4 * 3),
        "collective-permute": (8, 2, 8 * 4 * 8 * 2),
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
def test_groups_are_read_in_every_notation(groups, size):
    line = f"  ROOT %x = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to=%a"
    (found,) = hlo.collectives(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{line}\n}}", 8)
    assert found.group == size
    assert found.total == pytest.approx(2 * 32 * (size - 1) / size)


def nested(x):
    def inner(x, _):
        return jnp.sin(x @ x), None

    def outer(x, _):
        return jax.lax.scan(inner, x, length=5)[0], None

    return jax.lax.scan(outer, x, length=3)[0]


def stopped_early(x):
    def condition(carry):
        return (carry[0] < 17) & jnp.any(carry[1] > 0)

    return jax.lax.while_loop(condition, lambda carry: (carry[0] + 1, carry[1] - 1.0), (0, x))


@pytest.mark.parametrize(
    ("function", "expected"), [(nested, [3, 5]), (stopped_early, [17])], ids=["scans", "while"]
)
def test_loops_run_as_often_as_those_of_the_function(function, expected):
    text = jax.jit(function).lower(jnp.ones((64, 64))).compile().as_text()
    for each in (text, re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)):
        computations, _ = hlo._computations(each)
        lines = [line for lines in computations.values() for line in lines if " while(" in line]
        assert sorted(hlo._trip_count(computations, line) for line in lines) == expected


def test_each_peak_bounds_the_time():
    seconds = least_seconds(CHIPS["v5e"], flops=1.97e12, moved=819e9, received=100e9)
    assert seconds == pytest.approx({"compute": 0.01, "memory": 1.0, "network": 0.5})


def test_chips_have_the_peaks_of_the_utilization():
    assert {name: chip.flops for name, chip in CHIPS.items()} == {
        name: PEAK_FLOPS[f"TPU {name}"] for name in CHIPS
    }
