"""The traffic of eight devices in a step and the memory of each, read off the compiled programs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.compiled_steps import (
    HIDDEN,
    KEYS,
    LAYERS,
    PADDED,
    QUERIES,
    VOCABULARY,
    WIDTH,
)

pytestmark = [pytest.mark.slow, pytest.mark.newest]

ROOT = Path(__file__).resolve().parents[2]
ROLLOUTS = ("gpt2 rollout 2x2x2", "qwen3 rollout 1x8x1")
PROGRAMS = (
    *("gpt2 sft 1x8x1", "gpt2 linear 2x2x2"),
    "qwen3 ppo 2x2x2",
    *ROLLOUTS,
)


def kernels_of(program):
    """What a device has of each matrix of a layer once it is gathered over fsdp."""
    tensor = int(program[-1])
    mlp = [[WIDTH, HIDDEN // tensor], [HIDDEN // tensor, WIDTH]]
    if program.startswith("gpt2"):
        return [[WIDTH, 3, WIDTH // tensor], [WIDTH // tensor, WIDTH], *mlp]
    heads = QUERIES // tensor
    return [[WIDTH, heads], [WIDTH, KEYS // tensor], [heads, WIDTH], *mlp]


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
    kernels, shapes = kernels_of(program), found["gathered"][program]
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
    # All matrices, so that the expected shapes exist.
    assert {str(kernel) for kernel, _ in collected} == set(map(str, kernels_of(program)))


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_device_holds_the_gathered_matrices_of_all_layers(found, program):
    """Not even for the backward pass, which collects those of each layer once more."""
    full = {f"f32[{LAYERS},{','.join(map(str, kernel))}]" for kernel in kernels_of(program)}
    stacks = found["stacks"][program]
    assert not full & set(stacks)
    assert f"f32[{LAYERS},{WIDTH}]" in stacks  # layer norms are replicated


@pytest.mark.parametrize("program", ROLLOUTS)
def test_decoding_leaves_parameters_where_they_are(found, program):
    """The prompt's pass collects each matrix once; the loop over tokens collects none."""
    collected = [str(kernel) for kernel, _ in of_layers(found, program)]
    kernels = kernels_of(program)
    if program.startswith("qwen3"):  # keys and values, and the gate, have the same shape as another
        kernels += [kernels[1], kernels[3]]
    assert sorted(collected) == sorted(map(str, kernels))


@pytest.mark.parametrize("program", PROGRAMS)
def test_logits_are_never_gathered_over_the_vocabulary(found, program):
    table = [PADDED // int(program[-1]), WIDTH]
    shapes = found["gathered"][program]
    wide = [s for s in shapes if {VOCABULARY, PADDED} & set(s) and s != table]
    assert wide == []
    # The unembedding is collected over fsdp for an array of all logits, except in decoding; the
    # embedding never is.
    assert (table in shapes) == (program.split()[1] in ("sft", "ppo"))


def test_fsdp_divides_parameters_and_optimizer_state(found):
    per_device, full = found["bytes"]
    assert full / 8 <= per_device <= 1.02 * full / 8
