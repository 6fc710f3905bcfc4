"""The run folder: `config.yaml`, JSONL files, and errors of the disk as one sentence."""

import contextlib
import contextvars
import dataclasses
import errno
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from etils import epath

import rlhf_jax
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.parsing import to_dict, to_yaml, without_removed
from rlhf_jax.runtime.run.records import config_in

# The command that this process runs, such as "rlhf ppo --seed 1"; empty for a call from Python.
COMMAND: contextvars.ContextVar[str] = contextvars.ContextVar("COMMAND", default="")

# --- errors of the disk ---------------------------------------------------------------------------

_CONTINUES = "run the same command again: it continues from the last checkpoint"
_REMEDIES = {
    errno.ENOSPC: "free some space and",
    errno.EDQUOT: "free some space and",
    errno.EROFS: "make it writable or give another --run_dir, and",
    errno.EACCES: "make it writable or give another --run_dir, and",
    errno.EPERM: "make it writable or give another --run_dir, and",
    errno.ENOTDIR: "give another --run_dir, and",
    errno.EEXIST: "give another --run_dir, and",
}


@contextlib.contextmanager
def disk_errors(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an `OSError` of the block into an `InputError` that names the folder and a remedy.

    For blocks that do nothing but access the run folder. The `OSError` becomes the `__cause__`.

    >>> with disk_errors("runs/demo"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    rlhf_jax.errors.InputError: cannot write to runs/demo: No space left on device; free some \
space and run the same command again: it continues from the last checkpoint
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "mend that and")
        raise InputError(f"cannot write to {run_dir}: {reason}; {remedy} {_CONTINUES}") from error


def is_remote(path: epath.Path) -> bool:
    """Whether a path is an address in an object store, such as `gs://bucket/run`."""
    return "://" in str(path)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically: after an error, an `OSError`, it has its old content."""
    target = epath.Path(path)
    if is_remote(target):
        target.write_bytes(data)  # an object store shows an object once it is complete
        return
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with no content
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# --- JSONL ----------------------------------------------------------------------------------------


def encode_line(entry: Mapping[str, Any]) -> bytes:
    """One line of JSON; NaN and infinities become the strings "NaN", "Infinity", "-Infinity"."""
    text = json.dumps(_jsonable(entry), ensure_ascii=False, allow_nan=False)
    # A lone surrogate is written as its JSON escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # a scalar or an array of NumPy or JAX
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a JSONL file of a run, without an incomplete last line; [] without a file.

    The strings "NaN", "Infinity" and "-Infinity" stay strings here; `float` converts them. Raises
    an InputError if a line before the last one is not a JSON object.
    """
    file = epath.Path(path)
    return _parse(file.read_bytes(), file)[0] if file.is_file() else []


def cut_after(path: str | os.PathLike[str], step: int) -> None:
    """Drops the lines of a JSONL file whose step is greater than `step`, and an incomplete line.

    A run that continues from the checkpoint of `step` calls this first, so that no step is repeated
    in the file. The file is replaced atomically; a missing file is left missing. Raises an
    InputError as `read_lines` does, or if the folder cannot be written.
    """
    file = epath.Path(path)
    data = file.read_bytes() if file.is_file() else b""
    entries, incomplete = _parse(data, file)
    kept = [entry for entry in entries if entry.get("step", 0) <= step]
    if len(kept) < len(entries) or incomplete or (data and not data.endswith(b"\n")):
        with disk_errors(file.parent):
            replace_file(file, b"".join(map(encode_line, kept)))


def _parse(data: bytes, path: epath.Path) -> tuple[list[dict[str, Any]], bool]:
    """The entries of a JSONL file, and whether an incomplete last line was left out."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        elif number < len(lines):
            raise InputError(
                f"line {number} of {path} is not a JSON object; "
                "delete that line or give another --run_dir"
            )
    return entries, len(entries) < len(lines)


def last_metrics(run_dir: str | os.PathLike[str]) -> dict[str, float]:
    """The newest value of each metric in `metrics.jsonl`."""
    values: dict[str, float] = {}
    for line in read_lines(epath.Path(run_dir) / "metrics.jsonl"):
        values |= {key: float(value) for key, value in line.items() if key != "time"}
    return values


def read_progress(
    run_dir: str | os.PathLike[str], step: int
) -> tuple[dict[int, dict[str, float]], bool]:
    """(the evaluations up to a step, by step; whether `samples.jsonl` has entries of the step)."""
    folder = epath.Path(run_dir)
    evaluations: dict[int, dict[str, float]] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        values = {key: float(line[key]) for key in line if key.startswith("eval/")}
        if values and line["step"] <= step:
            evaluations.setdefault(line["step"], {}).update(values)
    return evaluations, any(line["step"] == step for line in read_lines(folder / "samples.jsonl"))


def is_finished(run_dir: str | os.PathLike[str]) -> bool:
    """Whether the last files that a stage writes exist."""
    folder = epath.Path(run_dir)
    return (folder / "hf" / "config.json").exists() and (folder / "report.html").exists()


# --- config.yaml ----------------------------------------------------------------------------------

# Settings that may change when a run continues: they have no influence on what is trained.
_FREE_TO_CHANGE = (
    "logging.",
    "checkpoint.",
    "evaluation.",
    "run_dir",
    "mesh.",
    "distributed.",
    "model.remat",
    "model.attention",
)


def claim_run_dir(config: Any) -> None:
    """Makes the run folder and writes `config.yaml`, or checks that the folder has the same one.

    Raises an InputError if the folder cannot be written, or holds a run with another configuration.
    """
    try:
        folder = epath.Path(config.run_dir)
        folder.exists()
    except ImportError as error:
        raise InputError(
            f"--run_dir {config.run_dir} needs a package that opens such addresses ({error}); "
            "install it, or give a local folder."
        ) from error
    # The processes are no part of a run: a repetition may have others.
    config = dataclasses.replace(config, distributed=type(config.distributed)())
    file = folder / "config.yaml"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        saved = yaml.safe_load(file.read_text()) if file.exists() else None
        saved = config_in(folder / "checkpoints") if saved is None else saved
        if saved is not None and _has_results(folder):
            check_same_config(config, saved)
        replace_file(file, config_text(config).encode())


def config_text(config: Any) -> str:
    """The content of `config.yaml`: version and command as a comment, and all settings."""
    command = "".join(each if each.isprintable() else " " for each in COMMAND.get())
    name = f"rlhf-jax {rlhf_jax.__version__}"
    return f"# {name}: {command}\n{to_yaml(config)}" if command else f"# {name}\n{to_yaml(config)}"


def _has_results(folder: epath.Path) -> bool:
    """Whether a folder holds any file but `config.yaml`; else its configuration may change."""
    return any(
        _has_results(path) if path.is_dir() else path.name != "config.yaml"
        for path in folder.iterdir()
    )


def check_same_config(config: Any, saved: Mapping[str, Any]) -> None:
    """Raises an InputError unless a run with the configuration `saved` may continue with `config`.

    Keys that an earlier version did not have count as the defaults.
    """
    old = _flat(to_dict(type(config)())) | _flat(without_removed(saved))
    new = _flat(to_dict(config))
    for key in sorted({*old, *new}):
        if key.startswith(_FREE_TO_CHANGE) or old.get(key) == new.get(key):
            continue
        raise InputError(
            f"The run folder {config.run_dir} was made with another configuration: {key} is "
            f"{old.get(key)!r} there and {new.get(key)!r} here; choose another --run_dir, or give "
            "the same configuration to continue that run."
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with keys such as "model.path"."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for part in parts for key, value in part.items()}
