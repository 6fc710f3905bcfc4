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
    """The shape on one device of each matrix of a layer once it is gathered over fsdp."""
    tensor = int(program[-1])
    mlp = [[WIDTH, HIDDEN // tensor], [HIDDEN // tensor, WIDTH]]
    if program.startswith("gpt2"):
        return [[WIDTH, 3, WIDTH // tensor], [WIDTH // tensor, WIDTH], *mlp]
    heads = QUERIES // tensor
    return [[WIDTH, heads], [WIDTH, KEYS // tensor], [heads, WIDTH], *mlp]


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.compiled_steps", *PROGRAMS],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def of_layers(report, program):
    """The matrices that a program gathers, as shapes of one layer, and how many layers each."""
    kernels, shapes = kernels_of(program), report["gathered"][program]
    pairs = [(shape, shape) for shape in shapes] + [(s[1:], s) for s in shapes if len(s) > 2]
    return [
        (kernel, math.prod(full) // math.prod(kernel))
        for kernel, full in pairs
        if kernel in kernels
    ]


@pytest.mark.parametrize("program", PROGRAMS)
def test_parameters_are_gathered_layer_by_layer(report, program):
    gathered = of_layers(report, program)
    assert {layers for _, layers in gathered} == {1}
    assert LAYERS > 1
    # All matrices, so that the expected shapes exist.
    assert {str(kernel) for kernel, _ in gathered} == set(map(str, kernels_of(program)))


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_device_holds_the_gathered_matrices_of_all_layers(report, program):
    """Not even for the backward pass, which gathers those of each layer once more."""
    full = {f"f32[{LAYERS},{','.join(map(str, kernel))}]" for kernel in kernels_of(program)}
    stacks = report["stacks"][program]
    assert not full & set(stacks)
    assert f"f32[{LAYERS},{WIDTH}]" in stacks  # layer norms are replicated


@pytest.mark.parametrize("program", ROLLOUTS)
def test_decoding_leaves_parameters_where_they_are(report, program):
    """The prompt's pass gathers each matrix once; the loop over tokens gathers none."""
    gathered = [str(kernel) for kernel, _ in of_layers(report, program)]
    kernels = kernels_of(program)
    if program.startswith("qwen3"):  # keys and values, and the gate, have the same shape as another
        kernels += [kernels[1], kernels[3]]
    assert sorted(gathered) == sorted(map(str, kernels))


@pytest.mark.parametrize("program", PROGRAMS)
def test_logits_are_never_gathered_over_the_vocabulary(report, program):
    table = [PADDED // int(program[-1]), WIDTH]
    shapes = report["gathered"][program]
    wide = [s for s in shapes if {VOCABULARY, PADDED} & set(s) and s != table]
    assert wide == []
    # The unembedding is gathered over fsdp for an array of all logits, except in decoding; the
    # embedding never is.
    assert (table in shapes) == (program.split()[1] in ("sft", "ppo"))


def test_fsdp_divides_parameters_and_optimizer_state(report):
    per_device, full = report["bytes"]
    assert full / 8 <= per_device <= 1.02 * full / 8
