"""The virtual environment of the peer, made where it is missing: the extra `bench`, and no JAX."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from rlhf_jax.errors import InputError
from scripts.benchmark.settings import PeerSettings

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

# Lies in an environment that the command has made, or has begun to make.
MARK = "made-by-rlhf-jax-benchmark"
# What trl_worker.py needs; all of it comes with the extra `bench`.
IMPORTED = ("trl", "torch", "transformers", "datasets", "tokenizers", "accelerate", "numpy")
_PROBE = f"""
from importlib import metadata, util
print(metadata.version("trl"), *(name for name in {IMPORTED} if util.find_spec(name) is None))
"""


# Says nothing but the number: what CUDA the PyTorch was built for, and whether it finds a GPU.
_CUDA_PROBE = "import torch; print(torch.version.cuda, torch.cuda.is_available())"


def check_cuda(python: str | os.PathLike[str]) -> None:
    """Raises an InputError unless the peer's PyTorch computes on a GPU."""
    done = subprocess.run([python, "-I", "-c", _CUDA_PROBE], capture_output=True, text=True)
    words = done.stdout.split()
    version, is_there = words if len(words) == 2 else ("None", "False")
    if is_there == "True":
        return
    what = "is built without CUDA" if version == "None" else f"is for CUDA {version} and finds none"
    raise InputError(
        f"JAX computes on a GPU, but the PyTorch of {python} {what}; install one for this driver "
        "from pytorch.org into an environment of your own, give that to --peer.venv, or measure "
        "without TRL by --peer none."
    )


def requirements() -> list[str]:
    """What the extra `bench` asks for, by the clone's pyproject.toml or else the installation."""
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        return list(project["optional-dependencies"]["bench"])
    parts = (line.partition(";") for line in metadata.requires("rlhf-jax") or [])
    extra = {'extra=="bench"', "extra=='bench'"}
    return [name.strip() for name, _, marker in parts if marker.replace(" ", "") in extra]


def peer_python(settings: PeerSettings) -> Path:
    """The Python of the peer's virtual environment, which is made where there is none.

    One with the right TRL is used as it is. Of others only those are touched that this has begun to
    make.

    Raises:
      InputError: it cannot be made, is another one's, or lacks what the peer imports.
    """
    venv = Path(settings.venv).absolute()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = next(line for line in requirements() if line.startswith("trl=="))
    wanted = wanted.partition("==")[2]
    ours, found, lacking = (venv / MARK).is_file(), *_packages(python)
    if found is None and not ours and os.path.lexists(venv):
        raise InputError(
            f"peer.venv {settings.venv} is there without trl, and is not changed, since this "
            "command has not made it; give --peer.venv a folder that is not there."
        )
    if found not in (None, wanted):
        raise InputError(
            f"peer.venv {settings.venv} has trl {found}, but the benchmark is of {wanted}; "
            "give --peer.venv another folder."
        )
    if found is None or (lacking and ours):
        _make(settings, venv, python)
        found, lacking = _packages(python)
    if found is None or lacking:
        raise InputError(
            f"peer.venv {settings.venv} lacks {', '.join(lacking) or 'trl'}; delete the folder, so "
            "that it is made again, or give --peer.venv another one."
        )
    return python


def _packages(python: Path) -> tuple[str | None, list[str]]:
    """(version of TRL, what is missing of the other packages) of an environment."""
    try:
        done = subprocess.run([python, "-I", "-c", _PROBE], capture_output=True, text=True)
    except OSError:
        return None, []
    if done.returncode != 0:
        return None, []
    version, *lacking = done.stdout.split()
    return version, lacking


def _make(settings: PeerSettings, venv: Path, python: Path) -> None:
    maker = settings.python or sys.executable
    asked = requirements()
    print(
        f"making {settings.venv} with {', '.join(asked)}; this takes some minutes",
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
    _run([*pip, *asked], f"pip could not install {', '.join(asked)} in {settings.venv}")


def _run(argv: list[str], failure: str) -> None:
    """Runs a program whose last complaint becomes the error."""
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
