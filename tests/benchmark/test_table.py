import os
from dataclasses import replace

import jax
import pytest

from scripts.benchmark import machine
from scripts.benchmark.floor import Phase, floor_seconds, phases_of
from scripts.benchmark.machine import Machine, busy_cores, hardware, measure_machine
from scripts.benchmark.results import summarize
from scripts.benchmark.table import as_text
from scripts.benchmark.workloads import GPU_WORKLOADS, Ours

HARDWARE = {
    "device": "Some CPU",
    "platform": "cpu",
    "processor": "Some CPU",
    "vector_instructions": "avx2, avx512f",
    "cores": 2,
}
MACHINE = Machine({"float32": 2e11, "bfloat16": 4e11}, read=2e10, copy=1e10)


def side(seconds, mebibytes, losses, compile_seconds=None):
    return {
        "ready": {"compile_seconds": compile_seconds},
        "seconds": seconds,
        "losses": losses,
        "peak_bytes": mebibytes * 2**20,
        "peak_of": "steps",
        "compilations_after_first_step": 0,
    }


@pytest.fixture
def sides():
    return {
        "ours": side([0.5, 0.6, 0.5], 600, [2.5, 2.25], 3.04),
        "trl": side([1.0, 1.5, 1.1], 1000, [None, None]),
        "ours_bfloat16": side([0.25, 0.3, 0.5], 500, [2.5, 2.5], 4.0),
    }


@pytest.fixture
def result(tiny, sides):
    phases = {"float32": [Phase(2e10, 1e9)], "bfloat16": [Phase(2e10, 2e9)]}
    return {
        "date": "2026-11-21",
        "hardware": HARDWARE,
        "versions": {"jax": "0.12.0", "trl": "0.29.1"},
        "machine": MACHINE._asdict(),
        "rounds": 3,
        "alternate": True,
        "attention": None,
        "busy_cores": [0.04, 1.26],
        "peer": {"name": "trl", "dtype": "float32"},
        "model_path": None,
        "checks": [{"check": "sft", "loss": 1e-7, "gradients": 2e-6}],
        "workloads": [summarize(tiny, sides, phases, MACHINE)],
    }


TABLE = """\
| workload | TRL, s | ours, s |        times faster | to reach | towards | tokens/s | TRL, MiB | \
ours, MiB | of TRL's memory | of the peak | floor, s | compile, s | compiled later |
| -------- | -----: | ------: | ------------------: | -------: | ------: | -------: | -------: | \
--------: | --------------: | ----------: | -------: | ---------: | -------------: |
| sft_tiny |  1.100 |   0.500 | 2.20 (2.00 to 2.50) |      1.5 |       - |       20 |     1000 | \
      600 |             60% |         20% |    0.100 |        3.0 |              0 |

In bfloat16:

| workload | ours, s | faster than float32 |     faster than TRL | tokens/s | ours, MiB | \
of TRL's memory | of the peak | floor, s | compile, s | compiled later | loss differs by |
| -------- | ------: | ------------------: | ------------------: | -------: | --------: | \
--------------: | ----------: | -------: | ---------: | -------------: | --------------: |
| sft_tiny |   0.300 |                2.00 | 4.00 (2.20 to 5.00) |       33 |       500 | \
            50% |         17% |    0.100 |        4.0 |              0 |         2.5e-01 |

2026-11-21, Some CPU (avx2, avx512f), 2 cores. jax 0.12.0, trl 0.29.1.
Measured here: products in float32 200 GFLOP/s, bfloat16 400 GFLOP/s; memory 20.0 GB/s read, \
10.0 GB/s read and written.
Medians of 3 turns, taken alternately; ratios turn by turn, with the least and the most.
TRL computes in float32.
Memory: the peak of the process during the turns, with its libraries.
Checked against the plain path: losses, gradients and samples of one step \
differ by at most 2.0e-06.
Other processes kept 0.0 cores busy before and 1.3 after, which slows PyTorch's threads down more \
than ours."""


def test_the_table(result):
    assert as_text(result) == TABLE


ALONE = """\
| workload | ours, s | tokens/s | ours, MiB | of the peak | floor, s | compile, s | compiled later |
| -------- | ------: | -------: | --------: | ----------: | -------: | ---------: | -------------: |
| sft_tiny |   0.500 |       20 |       600 |         20% |    0.100 |        3.0 |              0 |
"""


def test_without_a_peer_its_columns_are_left_out(tiny, sides):
    phases = {"float32": [Phase(2e10, 1e9)]}
    ours = {**sides["ours"], "peak_of": "process"}
    summary = summarize(tiny, {"ours": ours}, phases, MACHINE)
    text = as_text(
        {
            "date": "2026-11-21",
            "hardware": hardware(),
            "versions": {"jax": jax.__version__},
            "machine": MACHINE._asdict(),
            "rounds": 3,
            "alternate": True,
            "attention": None,
            "busy_cores": [None, None],
            "peer": {"name": "none", "dtype": "float32"},
            "model_path": None,
            "checks": None,
            "workloads": [summary],
        }
    )
    assert text.startswith(ALONE)
    assert "Medians of 3 turns.\n" in text
    assert not any(word in text for word in ("bfloat16:", "TRL", "PyTorch"))
    assert "since its start, since this system cannot reset it" in text
    assert text.endswith("Not checked against the plain path.")


ON_A_GPU = """\
Beside the limits of the device:

| workload | of the peak | peak to reach | of the floor | floor to reach |
| -------- | ----------: | ------------: | -----------: | -------------: |
| sft_tiny |         10% |           50% |          20% |              - |

"""


def test_a_line_in_bfloat16_has_its_targets_and_no_second_table(tiny, sides, result):
    """Both sides in bfloat16, one after the other, with cuDNN's attention checked."""
    half = replace(tiny, fixed_dtype="bfloat16", peak_to_reach=0.5)
    del sides["ours_bfloat16"]
    phases = {"bfloat16": [Phase(2e10, 2e9)]}
    attention = {"check": "attention cudnn", "loss": 1e-2, "gradients": 3e-2}
    text = as_text(
        result
        | {"workloads": [summarize(half, sides, phases, MACHINE)]}
        | {"alternate": False, "attention": attention, "model_path": "smollm2"}
        | {"hardware": HARDWARE | {"device": "Some GPU", "platform": "gpu"}}
    )
    assert "2026-11-21, Some GPU; Some CPU (avx2, avx512f), 2 cores." in text
    assert ON_A_GPU in text
    assert text.endswith("Weights of SmolLM2: smollm2.")
    assert "In bfloat16:" not in text
    assert "In bfloat16 on all sides: sft_tiny.\nTRL computes in float32 elsewhere.\n" in text
    assert "Medians of 3 turns, one side after the other; ratios" in text
    assert "differs from ours in bfloat16 by at most 3.0e-02." in text


def test_the_machine_is_measured():
    rates = measure_machine(sizes=(32, 64), memory=2**16)
    assert min(rates.read, rates.copy, *rates.flops.values()) > 0
    busy = busy_cores(seconds=0.05)
    assert busy is None or 0 <= busy <= os.cpu_count()
    assert rates.bandwidth == max(rates.read, rates.copy)


def test_the_processor_and_its_vector_instructions_are_named(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    cpuinfo.write_text(
        "model name\t: AMD X\nflags\t\t: fpu sse avx avx2 avx512f avx512_bf16 amx_bf16\n"
    )
    assert hardware()["processor"] == "AMD X"
    assert hardware()["vector_instructions"] == "avx2, avx512f, avx512_bf16, amx_bf16"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert machine.vector_instructions() == "asimd, sve"
    cpuinfo.unlink()
    assert machine.vector_instructions() == "unknown"


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("hw.optional.avx2_0: 1\nhw.optional.avx512f: 0\n", "avx2"),
        ("hw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_SME: 1\n", "advsimd, sme"),
        ("", "unknown"),
    ],
)
def test_vector_instructions_of_macos(output, names, monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    done = machine.subprocess.CompletedProcess([], 0, stdout=output)
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **options: done)
    assert machine.vector_instructions() == names


def test_phases_that_follow_each_other_add_up():
    phases = [Phase(flops=4.0, moved=3.0), Phase(flops=2.0, moved=30.0)]
    assert floor_seconds(phases, peak=2.0, bandwidth=10.0) == 2.0 + 3.0


def test_the_phases_of_steps_by_hand(tiny):
    """One layer of width 8, a vocabulary padded to 128, 8 positions."""
    layer = 4 * 8 + 8 * 24 + 24 + 8 * 8 + 8 + 2 * 8 * 32 + 32 + 8
    params = (128 + 8) * 8 + layer + 2 * 8
    sizes = {"prompt_length": 3, "response_length": 4}
    generation = replace(tiny, kind="generate", **sizes)
    (phase,) = phases_of(generation, "bfloat16")
    cache = 2 * 1 * 8 * 2 * (4 + 5 + 6)
    assert phase.moved == 2 * (4 * params + cache)
    (update,) = phases_of(tiny, "float32")
    assert update.moved == 4 * 8 * params
    frozen = replace(tiny, kind="ppo", num_layers_unfrozen=1, **sizes)
    sampling, rest = phases_of(frozen, "bfloat16")
    assert sampling == phase
    trained = layer + 2 * 8 + 9  # with the final norm and the value head
    others = (128 + 8) * 8 + (layer + 2 * 8) + (params + 8)  # embeddings, reference, reward model
    assert rest.moved == 4 * (8 * 8 * trained + others)
    assert rest.flops > 0


@pytest.mark.parametrize("ours", [Ours(remat="full"), Ours(attention="cudnn")], ids=str)
def test_the_phases_do_not_depend_on_remat_and_attention(tiny, ours):
    assert phases_of(replace(tiny, ours=ours), "float32") == phases_of(tiny, "float32")


def test_the_floor_of_generation_on_a_gpu_by_hand():
    """GPT-2 small in bfloat16: 127 further tokens of 256 responses, behind prompts of 64."""
    (workload,) = (each for each in GPU_WORKLOADS if each.kind == "generate")
    (phase,) = phases_of(workload, "bfloat16")
    layer = 12 * 768 * 768 + 13 * 768  # kernels, and their biases and norms
    params = 12 * layer + (50304 + 1024) * 768 + 2 * 768
    position = 2 * 12 * 768 * 256
    positions = 127 * 64 + 127 * 128 // 2
    assert phase.moved == 2 * (128 * params + position * positions)
