"""The virtual environment of the peer: the extra `bench`, without JAX."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from rlhf_jax.errors import InputError
from scripts.benchmark.settings import PeerSettings

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

# A file in each environment that this command made, or began to make.
MARK = "made-by-rlhf-jax-benchmark"
# The imports of trl_worker.py, all in the extra `bench`.
IMPORTED = ("trl", "torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")
_PROBE = f"""
from importlib import metadata, util
print(metadata.version("trl"), *(name for name in {IMPORTED} if util.find_spec(name) is None))
"""
# Prints the CUDA version that PyTorch was built for, and whether it finds a GPU.
_CUDA_PROBE = "import torch; print(torch.version.cuda, torch.cuda.is_available())"


def check_cuda(python: str | os.PathLike[str]) -> None:
    """Raises an InputError unless the PyTorch of the peer finds a GPU."""
    done = subprocess.run([python, "-I", "-c", _CUDA_PROBE], capture_output=True, text=True)
    words = done.stdout.split()
    version, is_available = words if len(words) == 2 else ("None", "False")
    if is_available == "True":
        return
    problem = (
        "is built without CUDA" if version == "None" else f"is for CUDA {version} and finds none"
    )
    raise InputError(
        f"JAX computes on a GPU, but the PyTorch of {python} {problem}; install one for this "
        "driver from pytorch.org into an environment of your own, give that to --peer.venv, or "
        "measure without TRL by --peer none."
    )


def requirements() -> list[str]:
    """The packages of the extra `bench`."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return list(project["optional-dependencies"]["bench"])


def peer_python(settings: PeerSettings) -> Path:
    """The Python of the virtual environment of the peer, which is made if it is missing.

    An environment with the required version of TRL is used unchanged; one that this command began
    to make is completed.

    Raises:
      InputError: the environment cannot be made, was made by somebody else, or lacks packages.
    """
    venv = Path(settings.venv).absolute()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    required = next(line for line in requirements() if line.startswith("trl=="))
    required = required.partition("==")[2]
    is_ours, version, missing = (venv / MARK).is_file(), *_packages(python)
    if version is None and not is_ours and os.path.lexists(venv):
        raise InputError(
            f"peer.venv {settings.venv} exists without trl, and is not changed, since this "
            "command has not made it; give --peer.venv a folder that does not exist."
        )
    if version not in (None, required):
        raise InputError(
            f"peer.venv {settings.venv} has trl {version}, but the benchmark needs {required}; "
            "give --peer.venv another folder."
        )
    if version is None or (missing and is_ours):
        _make(settings, venv, python)
        version, missing = _packages(python)
    if version is None or missing:
        raise InputError(
            f"peer.venv {settings.venv} lacks {', '.join(missing) or 'trl'}; delete the folder, so "
            "that it is made again, or give --peer.venv another one."
        )
    return python


def _packages(python: Path) -> tuple[str | None, list[str]]:
    """(version of TRL or None, missing packages) of an environment."""
    try:
        done = subprocess.run([python, "-I", "-c", _PROBE], capture_output=True, text=True)
    except OSError:
        return None, []
    if done.returncode != 0:
        return None, []
    version, *missing = done.stdout.split()
    return version, missing


def _make(settings: PeerSettings, venv: Path, python: Path) -> None:
    maker = settings.python or sys.executable
    packages = requirements()
    print(
        f"making {settings.venv} with {', '.join(packages)}; this takes some minutes",
        file=sys.stderr,
        flush=True,
    )
    try:
        venv.mkdir(parents=True, exist_ok=True)
        (venv / MARK).touch()
    except OSError as error:
        raise InputError(
            f"cannot make {settings.venv} ({error.strerror}); give --peer.venv another folder."
        ) from error
    _run([maker, "-m", "venv", str(venv)], f"{maker} could not make {settings.venv}")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *packages], f"pip could not install {', '.join(packages)} in {settings.venv}")


def _run(argv: list[str], failure: str) -> None:
    """Runs a program; raises an InputError with its last error message."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        if done.returncode == 0:
            return
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["nothing"]
        reason = errors[-1].removeprefix("ERROR: ")
    raise InputError(
        f"{failure} ({reason.rstrip('.')[:300]}); choose another Python with --peer.python, or "
        "measure without TRL by --peer none."
    )
