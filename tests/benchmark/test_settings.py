import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from rlhf_jax.errors import InputError
from rlhf_jax.models import cudnn_attention
from rlhf_jax.runtime.config import parse
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import command, environment
from scripts.benchmark.programs import abstract, make_program
from scripts.benchmark.settings import NAMES, BenchmarkConfig, BenchmarkError, PeerSettings
from scripts.benchmark.workloads import (
    GPU_WORKLOADS,
    WORKLOADS,
    in_float32,
    make_arrays,
    make_request,
    read_request,
)


@pytest.fixture(autouse=True)
def restore_handlers(monkeypatch):
    """The command changes the handler of SIGTERM and the environment."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    terminated = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, terminated)


def test_workloads_are_chosen_in_the_order_of_the_table():
    config = parse(BenchmarkConfig, ["--workloads", "[ppo_mid, sft_mid]"])
    for platform in ("cpu", "gpu"):
        assert [each.name for each in config.chosen(platform)] == ["sft_mid", "ppo_mid"]
    assert BenchmarkConfig().chosen("cpu") == WORKLOADS
    assert len(NAMES) == 20


def test_workloads_for_a_gpu_need_a_gpu():
    assert BenchmarkConfig().chosen("gpu") == WORKLOADS + GPU_WORKLOADS
    config = BenchmarkConfig(workloads=("sft_gpu_xl", "sft_mid"))
    assert [each.name for each in config.chosen("gpu")] == ["sft_mid", "sft_gpu_xl"]
    with pytest.raises(InputError, match="sft_gpu_xl needs an NVIDIA GPU, but JAX runs on cpu; in"):
        config.chosen("cpu")
    for each in GPU_WORKLOADS:
        model = make_program(each, make_arrays(each), each.fixed_dtype).model
        assert (model.attention, model.config.attn_pdrop) == ("cudnn", 0.0)
        assert in_float32(each).ours.attention == "blocks"
    xl = config.chosen("gpu")[1]
    assert (xl.n_layer, xl.n_embd, xl.n_head, xl.tokens) == (48, 1600, 25, 8 * 1024)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workloads", "[sft_md]"], r"Unknown workload 'sft_md' \(did you mean sft_mid\?\); the"),
        (["--rounds", "0"], "rounds must be at least 1, but is 0"),
        (["--peer.name", "tunix"], "peer.name must be one of"),
        (["--dtype", "float16"], "dtype must be one of"),
    ],
)
def test_wrong_settings_are_one_sentence(flags, message):
    with pytest.raises(InputError, match=message):
        parse(BenchmarkConfig, flags)


def test_a_file_that_cannot_be_written_is_an_error_before_the_measurement(tmp_path):
    with pytest.raises(InputError, match="give --json a file in a folder that exists"):
        command.run_benchmark({"json": str(tmp_path / "none" / "file.json")})


def test_peer_none_is_short_for_its_name(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--peer", "none", "--print_config"])
    assert "name: none" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--peer", "tunix"], ["--peer=tunix"]], ids=str)
def test_an_unknown_peer_is_one_sentence(flags, capsys):
    assert benchmark.main(flags) == 2
    assert "peer.name must be one of trl, none, but is 'tunix'" in capsys.readouterr().err


def test_the_command_runs_from_any_folder(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "benchmark.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: scripts/benchmark.py [--config FILE.yaml]" in done.stdout
    assert "--workloads" in done.stdout


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (signal.SIGINT, KeyboardInterrupt, "^Interrupted; the same command measures everything"),
        (signal.SIGTERM, benchmark._TerminatedError, "^15$"),
    ],
)
def test_a_signal_ends_the_command_with_an_exception(number, error, text, monkeypatch):
    """The sides are killed and their files deleted while the exception propagates."""
    monkeypatch.setattr(command, "run_benchmark", lambda config: os.kill(os.getpid(), number))
    # A process that a shell starts in the background ignores Ctrl-C.
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, benchmark._terminate)
    try:
        with pytest.raises(error, match=text):
            benchmark.measure(BenchmarkConfig())
    finally:
        signal.signal(signal.SIGINT, interrupted)


def test_a_failed_check_and_a_signal_are_statuses_of_the_command(monkeypatch, capsys):
    def fail(config):
        raise BenchmarkError("the check failed")

    monkeypatch.setattr(command, "run_benchmark", fail)
    assert benchmark.main([]) == 2
    assert capsys.readouterr().err == "error: the check failed.\n"
    monkeypatch.setattr(command, "run_benchmark", lambda config: os.kill(os.getpid(), 15))
    assert benchmark.main([]) == 143


def test_sizes_of_workloads():
    by_name = {workload.name: workload for workload in WORKLOADS}
    assert by_name["reward_frozen_small"].num_layers_unfrozen == 4
    assert by_name["ppo_shared_small"].num_layers_unfrozen == 2
    assert by_name["ppo_mid"].value_model == "reward"
    assert by_name["sft_small"].tokens == 2 * 496
    assert by_name["reward_mid"].tokens == 4 * (192 + 2 * 32)
    assert by_name["generate_mid"].tokens == 16 * 32
    assert by_name["sft_smollm2"].tokens == 2 * 512
    assert by_name["generate_smollm2"].cached_width == 3 * 64


def test_the_environment_of_the_peer_has_the_extra_bench_and_no_jax():
    packages = environment.requirements()
    assert "trl==0.29.1" in packages
    assert not any("jax" in line for line in packages)


def fake_python(folder, text):
    """An environment whose Python is a shell script."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)
    return python


def test_an_environment_with_the_right_trl_is_used_and_another_refused(tmp_path):
    right = fake_python(tmp_path / "right", "echo 0.29.1")
    assert environment.peer_python(PeerSettings(venv=str(tmp_path / "right"))) == right
    fake_python(tmp_path / "other", "echo 0.30.0")
    with pytest.raises(InputError, match=r"has trl 0\.30\.0, but the benchmark needs 0\.29\.1"):
        environment.peer_python(PeerSettings(venv=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("echo 13.0 True", None),
        ("echo 13.0 False", "is for CUDA 13.0 and finds none"),
        ("echo None False", "is built without CUDA"),
        ("exit 1", "is built without CUDA"),
    ],
)
def test_a_pytorch_that_does_not_find_the_gpu_of_jax_is_an_error(tmp_path, output, problem):
    python = fake_python(tmp_path / "venv", output)
    if problem is None:
        environment.check_cuda(python)
        return
    with pytest.raises(
        InputError, match=f"the PyTorch of .* {problem}; install one for this driver"
    ):
        environment.check_cuda(python)


def test_an_environment_made_by_somebody_else_is_not_changed(tmp_path):
    """An environment without TRL, and a file."""
    fake_python(tmp_path / "theirs", "exit 1")
    (tmp_path / "file").touch()
    for name in ("theirs", "file"):
        with pytest.raises(InputError, match="exists without trl, and is not changed"):
            environment.peer_python(PeerSettings(python="/none", venv=str(tmp_path / name)))
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["bin"]


def test_an_environment_that_lacks_a_package_is_an_error_before_the_measurement(tmp_path):
    fake_python(tmp_path / "venv", "echo 0.29.1 datasets numpy")
    with pytest.raises(InputError, match="venv lacks datasets, numpy; delete the folder, so that"):
        environment.peer_python(PeerSettings(python="/none", venv=str(tmp_path / "venv")))


def test_an_unfinished_environment_is_completed(tmp_path):
    """TRL is installed after pip has run."""
    done = tmp_path / "done"
    pip = f'case "$*" in *pip*) touch {done};; *) test -e {done} && echo 0.29.1;; esac'
    python = fake_python(tmp_path / "venv", pip)
    (tmp_path / "venv" / environment.MARK).touch()
    settings = PeerSettings(python="true", venv=str(tmp_path / "venv"))
    assert environment.peer_python(settings) == python
    assert done.exists()


def test_an_error_of_pip_is_one_sentence(tmp_path, capsys):
    maker = tmp_path / "maker"
    maker.write_text("#!/bin/sh\nexit 0\n")
    maker.chmod(0o755)
    fake_python(tmp_path / "venv", 'echo "ERROR: No matching torch"; exit 1')
    (tmp_path / "venv" / environment.MARK).touch()
    settings = PeerSettings(python=str(maker), venv=str(tmp_path / "venv"))
    with pytest.raises(InputError, match=r"pip could not install trl.* \(No matching torch\); cho"):
        environment.peer_python(settings)
    assert "this takes some minutes" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"could not make .* \(No such file or directory\)"):
        environment.peer_python(PeerSettings(python="/none", venv=str(tmp_path / "new")))
    assert (tmp_path / "new" / environment.MARK).is_file()  # the next attempt continues there


@pytest.mark.newest
def test_workloads_for_a_gpu_call_the_kernel_of_cudnn(monkeypatch):
    """Small workloads of each kind, lowered for CUDA."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn_attention, "check_device", lambda name: None)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 61, "batch_size": 4}
    for each in GPU_WORKLOADS:
        small = dataclasses.replace(each, **sizes, prompt_length=3, response_length=4)
        program = make_program(small, make_arrays(small), small.fixed_dtype)
        traced = program.jitted.trace(*abstract(program))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "@__cudnn$fmhaScaleBiasSoftmax(" in text
        assert ("@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text) == (each.kind != "generate")


def write_smollm2(folder, **changes):
    """Writes a config.json with the sizes of SmolLM2-135M, as transformers does."""
    sizes = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(sizes | {"eos_token_id": 2} | changes))


def test_a_folder_gives_its_weights_to_workloads_of_its_sizes(tmp_path):
    write_smollm2(tmp_path)
    names = ("sft_mid", "sft_smollm2")
    chosen = BenchmarkConfig(workloads=names, model_path=str(tmp_path)).chosen("cpu")
    command._check_model(str(tmp_path), chosen)
    assert chosen[0].llama is None
    assert chosen[1].llama.path == str(tmp_path)
    assert read_request(make_request(chosen[1], "float32")) == (chosen[1], "float32")
    with pytest.raises(InputError, match="for workloads of SmolLM2, and none was chosen; leave"):
        command._check_model(str(tmp_path), chosen[:1])
    write_smollm2(tmp_path, num_key_value_heads=9)
    with pytest.raises(InputError, match="has num_key_value_heads 9, but sft_smollm2 needs 3; gi"):
        command._check_model(str(tmp_path), chosen)
