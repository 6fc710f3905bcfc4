"""The traffic of eight devices in a step and the memory of each, read off the compiled programs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.compiled_steps import LAYERS, PADDED, VOCABULARY, WIDTH

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROLLOUTS = ("rollout 1x8x1", "rollout 2x2x2")
PROGRAMS = ("sft 1x8x1", "linear 2x2x2", "reward 2x2x2", "ppo 2x2x2", *ROLLOUTS)
# By the tensor axis: what a device has of each matrix of a layer once it is gathered over fsdp.
KERNELS = {
    tensor: [
        [WIDTH, 3, WIDTH // tensor],
        [WIDTH // tensor, WIDTH],
        [WIDTH, 1216 // tensor],
        [1216 // tensor, WIDTH],
    ]
    for tensor in (1, 2)
}


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.compiled_steps", *PROGRAMS],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def of_layers(found, program):
    """The matrices that a program collects, as shapes of one layer, and how many layers each."""
    kernels, shapes = KERNELS[int(program[-1])], found["gathered"][program]
    pairs = [(shape, shape) for shape in shapes] + [(s[1:], s) for s in shapes if len(s) > 2]
    return [
        (kernel, math.prod(full) // math.prod(kernel))
        for kernel, full in pairs
        if kernel in kernels
    ]


@pytest.mark.parametrize("program", PROGRAMS)
def test_parameters_are_gathered_layer_by_layer(found, program):
    collected = of_layers(found, program)
    assert {layers for _, layers in collected} == {1}
    assert LAYERS > 1
    # All four matrices, so that the expected shapes exist.
    assert {str(kernel) for kernel, _ in collected} == set(map(str, KERNELS[int(program[-1])]))


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_device_holds_the_gathered_matrices_of_all_layers(found, program):
    """Not even for the backward pass, which collects those of each layer once more."""
    full = {f"f32[{LAYERS},{','.join(map(str, kernel))}]" for kernel in KERNELS[int(program[-1])]}
    stacks = found["stacks"][program]
    assert not full & set(stacks)
    assert f"f32[{LAYERS},{WIDTH}]" in stacks  # layer norms are replicated


@pytest.mark.parametrize("program", ROLLOUTS)
def test_decoding_leaves_parameters_where_they_are(found, program):
    """The prompt's pass collects each matrix once; the loop over tokens collects none."""
    collected = [str(kernel) for kernel, _ in of_layers(found, program)]
    assert sorted(collected) == sorted(map(str, KERNELS[int(program[-1])]))


@pytest.mark.parametrize("program", PROGRAMS)
def test_logits_are_never_gathered_over_the_vocabulary(found, program):
    table = [PADDED // int(program[-1]), WIDTH]
    shapes = found["gathered"][program]
    wide = [s for s in shapes if {VOCABULARY, PADDED} & set(s) and s != table]
    assert wide == []
    assert table in shapes  # the table itself is collected, over fsdp


def test_fsdp_divides_parameters_and_optimizer_state(found):
    per_device, full = found["bytes"]
    assert full / 8 <= per_device <= 1.02 * full / 8
