"""The virtual environment of the peer, made where it is missing: the extra `bench`, and no JAX."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from rlhf_jax.benchmark.settings import PeerSettings
from rlhf_jax.errors import InputError

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def requirements() -> list[str]:
    """What the extra `bench` asks for, by the clone's pyproject.toml or else the installation."""
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text())["project"]
        return list(project["optional-dependencies"]["bench"])
    parts = (line.partition(";") for line in metadata.requires("rlhf-jax") or [])
    extra = {'extra=="bench"', "extra=='bench'"}
    return [name.strip() for name, _, marker in parts if marker.replace(" ", "") in extra]


def peer_python(settings: PeerSettings) -> Path:
    """The Python of the peer's virtual environment, which is made if it has not the right TRL.

    Raises:
      InputError: it cannot be made, or is there and has another TRL.
    """
    venv = Path(settings.venv).absolute()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = next(line for line in requirements() if line.startswith("trl=="))
    wanted = wanted.partition("==")[2]
    if python.exists():
        found = _trl_version(python)
        if found == wanted:
            return python
        # One that is half made is ours to finish; another one is not ours to change.
        if found is not None:
            raise InputError(
                f"peer.venv {settings.venv} has trl {found}, but the benchmark is of {wanted}; "
                "give --peer.venv another folder."
            )
    _make(settings, venv, python)
    return python


def _trl_version(python: Path) -> str | None:
    code = "from importlib import metadata; print(metadata.version('trl'))"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _make(settings: PeerSettings, venv: Path, python: Path) -> None:
    maker = settings.python or sys.executable
    asked = requirements()
    print(
        f"making {settings.venv} with {', '.join(asked)}; this takes some minutes",
        file=sys.stderr,
        flush=True,
    )
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
        "measure without TRL by --peer.name none."
    )
