"""The launch helpers: what they would run, and what they say of a wrong call."""

import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "launch"
SCRIPT = ["scripts/run_rlhf.py", "--run_dir", "gs://runs/a b"]
SLICE = ["--name", "slice", "--zone", "zone-a"]
CALLS = [
    ("gpus.sh", SCRIPT, [r".venv/bin/python scripts/run_rlhf.py --run_dir gs://runs/a\ b"]),
    (
        "gpus.sh",
        ["--processes", "2", "--port", "8476", *SCRIPT],
        [
            r"--run_dir gs://runs/a\ b --distributed.coordinator localhost:8476 "
            rf"--distributed.num_processes 2 --distributed.process_id {place} "
            rf"--distributed.local_device_ids \[{place}\]"
            for place in range(2)
        ],
    ),
    ("slurm.sh", SCRIPT, [r"srun --kill-on-bad-exit=1 --gpu-bind=none .venv/bin/python scripts/"]),
    (
        "tpu_vm.sh",
        [*SLICE, "create", "--type", "v5litepod-16", "--version", "some", "--spot"],
        [
            "gcloud compute tpus queued-resources create slice --node-id=slice --zone=zone-a "
            "--accelerator-type=v5litepod-16 --runtime-version=some --spot"
        ],
    ),
    ("tpu_vm.sh", [*SLICE, "setup"], ["git archive", "scp", "--worker=all --command=mkdir"]),
    (
        "tpu_vm.sh",
        [*SLICE, "--project", "mine", "start", *SCRIPT],
        [r"tpu-vm ssh slice --zone=zone-a --project=mine --worker=all --command=cd\ rlhf_jax"],
    ),
    ("tpu_vm.sh", [*SLICE, "stop"], [r"--worker=all --command=kill\ -TERM"]),
]


def call(name, *arguments):
    command = ["bash", str(FOLDER / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "arguments", "expected"), CALLS)
def test_a_dry_run_prints_the_commands(name, arguments, expected):
    done = call(name, "--dry_run", *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line


@pytest.mark.parametrize("name", ["gpus.sh", "slurm.sh", "tpu_vm.sh"])
def test_help_says_how_each_is_called(name):
    done = call(name, "--help")
    assert f"scripts/launch/{name}" in done.stdout
    assert "--dry_run" in done.stdout
    assert "set -" not in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("gpus.sh", [], "name a script"),
        ("gpus.sh", ["--processes", "none", *SCRIPT], "--processes must be a number"),
        ("gpus.sh", ["--wrong", *SCRIPT], "--wrong is no option"),
        ("slurm.sh", SCRIPT, "to be given to sbatch"),
        ("tpu_vm.sh", ["--name", "slice", "setup"], "--zone"),
        ("tpu_vm.sh", [*SLICE, "begin"], "begin is no action"),
    ],
)
def test_a_wrong_call_is_an_error_of_one_line(name, arguments, said):
    done = call(name, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
