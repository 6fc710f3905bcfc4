"""The run folder: `config.yaml`, JSONL files, and errors of the disk as one sentence."""

import contextlib
import contextvars
import dataclasses
import errno
import importlib.metadata
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.parsing import checked_section, flat, to_dict, to_yaml
from rlhf_jax.runtime.run.records import newest_record
from rlhf_jax.runtime.yaml_files import checked_path, parsed_yaml

logger = logging.getLogger("rlhf_jax.runtime.run")

# Values, such as a number or a checksum, of data and tokenizer by their names in words.
Fingerprints = Mapping[str, Mapping[str, Any]]

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
def disk_errors(path: str | os.PathLike[str], remedy: str = "") -> Iterator[None]:
    """Turns an `OSError` of the block into an `InputError` that names the path and a remedy.

    For blocks that do nothing but access that path, by default the folder of a run that continues
    from its checkpoints. The `OSError` becomes the `__cause__`.

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
        if not remedy:
            remedy = f"{_REMEDIES.get(error.errno or 0, 'mend that and')} {_CONTINUES}"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free some space, or {remedy}"
        raise InputError(f"cannot write to {path}: {reason}; {remedy}") from error


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
        except (ValueError, RecursionError):
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


def is_finished(config: Any) -> bool:
    """Whether the last files that a stage writes exist, and the run is not to be extended."""
    folder = epath.Path(config.run_dir)
    with disk_errors(folder):
        if not ((folder / "hf" / "config.json").exists() and (folder / "report.html").exists()):
            return False
        return not changed_length(config, newest_record(folder).get("config"))


# --- config.yaml ----------------------------------------------------------------------------------

# Settings that may change when a run continues: they have no influence on the training.
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


def make_run_dir(run_dir: str) -> epath.Path:
    """The run folder, made if missing; an InputError if that cannot be."""
    if not checked_path("run_dir", run_dir):
        raise InputError("run_dir is empty; give --run_dir the folder that the run is to write.")
    with disk_errors(run_dir):
        try:
            folder = epath.Path(run_dir)
            folder.mkdir(parents=True, exist_ok=True)
        except ImportError as error:
            raise InputError(
                f"--run_dir {run_dir} needs a package that opens such addresses ({error}); install "
                "it, or give a local folder."
            ) from error
    return folder


def claim_run_dir(config: Any) -> None:
    """Makes the run folder with its `config.yaml`, or checks that a run with results may continue.

    The files of such a run are left as they are: a later check may refuse the command. `reopen`
    follows when all is accepted.

    Raises an InputError if the folder cannot be written, or holds a run with another configuration.
    """
    folder = make_run_dir(config.run_dir)
    with disk_errors(folder):
        saved = _saved_config(folder) if _has_results(folder) else None
        if saved is not None:
            check_same_config(config, saved)
            note, has_model = changed_length(config, saved), (folder / "hf").exists()
            if note and has_model and not newest_record(folder):
                raise InputError(
                    f"The run in {folder} cannot get another length, as it has no checkpoint to "
                    f"continue from{note}; choose another --run_dir."
                )
        if saved is None:  # samples before the first step may be of another configuration
            for name in _OF_STEPS:
                (folder / name).unlink(missing_ok=True)
        if saved is None or _config_in(folder)[0] is None:
            write_config(config)


def reopen(config: Any) -> None:
    """Writes `config.yaml`, and removes the last files of an earlier end of a longer run."""
    write_config(config)
    folder = epath.Path(config.run_dir)
    with disk_errors(folder):
        models = ("hf/config.json", "adapter/adapter_config.json")
        for name in ("report.html", "evaluation.json", *models):
            (folder / name).unlink(missing_ok=True)


def write_config(config: Any) -> None:
    """Writes `config.yaml`, without the processes: a repetition may have others."""
    config = dataclasses.replace(config, distributed=type(config.distributed)())
    with disk_errors(config.run_dir):
        replace_file(f"{config.run_dir}/config.yaml", config_text(config).encode())


def _saved_config(folder: epath.Path) -> Mapping[str, Any] | None:
    """The configuration in `config.yaml`; that of the newest checkpoint, if the file is damaged."""
    file = folder / "config.yaml"
    config, reason = _config_in(folder)
    if config is not None:
        return config
    saved = newest_record(folder).get("config")
    if reason is not None and saved is None:
        raise InputError(
            f"{file} is damaged ({reason}), and no checkpoint holds the configuration: put it back "
            "from a copy, or choose another --run_dir."
        )
    if reason is not None:
        logger.warning("%s is damaged (%s); that of the newest checkpoint is used.", file, reason)
    return saved


def _config_in(folder: epath.Path) -> tuple[Mapping[str, Any] | None, ValueError | None]:
    """(the content of `config.yaml`, None if missing or damaged; the damage)."""
    file = folder / "config.yaml"
    try:
        return checked_section(parsed_yaml(file.read_text()), "it") if file.exists() else None, None
    except ValueError as error:
        return None, error


def config_text(config: Any) -> str:
    """The content of `config.yaml`: version and command as a comment, and all settings."""
    command = "".join(each if each.isprintable() else " " for each in COMMAND.get())
    name = f"rlhf-jax {importlib.metadata.version('rlhf-jax')}"
    return f"# {name}: {command}\n{to_yaml(config)}" if command else f"# {name}\n{to_yaml(config)}"


# Files that are no results, as another configuration may continue from them: those of sampled
# responses and of a reference have a mark with their origin.
_NO_RESULTS = (
    *("config.yaml", "lock", "reference.npz"),
    *("sampled.jsonl", "sampled.json", "selected.jsonl"),
)
_OF_STEPS = ("metrics.jsonl", "samples.jsonl")


def _has_results(folder: epath.Path) -> bool:
    """Whether a folder holds results of a step of a run; else its configuration may change."""
    return any(map(_is_result, folder.iterdir()))


def _is_result(path: epath.Path) -> bool:
    if path.is_dir():
        return _has_results(path)
    if path.name in _OF_STEPS:
        return any(line.get("step", 0) > 0 for line in read_lines(path))
    return path.name not in _NO_RESULTS


def check_same_config(config: Any, saved: Mapping[str, Any]) -> None:
    """Raises an InputError unless a run with the configuration `saved` may continue with `config`.

    Keys that an earlier version did not have count as the defaults.
    """
    for key, (old, new) in _differences(config, saved).items():
        if not key.startswith((*_FREE_TO_CHANGE, *config.length_settings)):
            raise InputError(
                f"The run folder {config.run_dir} was made with another configuration: {key} is "
                f"{old!r} there and {new!r} here; choose another --run_dir, or give the same "
                "configuration to continue that run."
            )


def changed_length(config: Any, saved: Mapping[str, Any] | None, schedule: str = "constant") -> str:
    """The settings of the length of a run that differ from the saved ones, in words; "" if none."""
    differences = {} if saved is None else _differences(config, saved)
    changed = [key for key in differences if key in config.length_settings]
    notes = [
        f"; {key} is {differences[key][1]} now and was {differences[key][0]}" for key in changed
    ]
    if changed and schedule != "constant":
        notes.append(f"; from here on the {schedule} schedule is that of the new length")
    return "".join(notes)


def _differences(config: Any, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(saved value, value here) of each setting that differs."""
    old = flat(to_dict(type(config)())) | flat(saved)
    new = flat(to_dict(config))
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in keys}


def finished_note(run_dir: str, fingerprints: Callable[[], Fingerprints]) -> str:
    """The sentence on a complete run; an InputError if its data changed."""
    saved, note = newest_record(epath.Path(run_dir)).get("fingerprints", {}), ""
    try:
        ours = fingerprints() if saved else {}
    except InputError as error:
        ours, note = {}, f" Its data were not compared: {error}"
    check_same_data(run_dir, saved, ours)
    return f"{run_dir} is complete; nothing is left to do.{note}"


def check_same_data(run_dir: str, saved: Fingerprints, ours: Fingerprints) -> None:
    """Raises an InputError that names the first difference of two fingerprints of data."""
    for name, here in ours.items():
        for part, value in here.items():
            there = saved.get(name, {}).get(part, value)
            if there != value:
                raise InputError(
                    f"{name} changed since the run in {run_dir} began: {part} was {there} then and "
                    f"is {value} now; put it back, or choose another --run_dir to start anew."
                )
