"""What a run writes while it works: JSONL files, TensorBoard, W&B.

`metrics.jsonl` and `samples.jsonl` are the record that continuing and reporting rely on; the others
are copies of it for watching. A disk that cannot be written ends the run with one sentence.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from rlhf_jax.errors import InputError

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


@dataclasses.dataclass(frozen=True)
class Settings:
    """The `logging` section of the configuration.

    Attributes:
      log_every: steps between two lines of `metrics.jsonl`.
      eval_every: steps between two evaluations; 0 evaluates only at the end.
      samples_every: steps between two entries of `samples.jsonl`; 0 writes them only at the end.
      num_samples: responses per entry of `samples.jsonl`.
      progress: show the progress line on standard error.
      tensorboard: write TensorBoard event files to `run_dir/tensorboard`.
      wandb: send the metrics to Weights & Biases (needs the package `wandb`).
      wandb_project: the project that the run appears in.
    """

    log_every: int = 1
    eval_every: int = 0
    samples_every: int = 0
    num_samples: int = 8
    progress: bool = True
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "rlhf_jax"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("log_every", self.log_every, 1),
            ("eval_every", self.eval_every, 0),
            ("samples_every", self.samples_every, 0),
            ("num_samples", self.num_samples, 0),
        ):
            if value < least:
                raise InputError(
                    f"logging.{name} is {value}, but must be {least} or more; set --logging.{name}"
                )
        if self.wandb and not self.wandb_project:
            raise InputError(
                "logging.wandb_project is empty, but logging.wandb needs the name of a project; "
                "set --logging.wandb_project"
            )


@contextlib.contextmanager
def disk_errors(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an `OSError` of the block into an `InputError` that names the folder and what to do.

    Put it around writes to the run folder and nothing else: it blames the folder for any `OSError`.

    Raises:
      InputError: in place of an `OSError`, which stays its `__cause__`.

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


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a JSONL file of a run, in order; none if there is no such file.

    A last line that was torn off while it was written is left out. The strings "NaN", "Infinity"
    and "-Infinity" stay strings here: `float` reads them.

    Raises:
      InputError: a line before the last one is not a JSON object.
    """
    file = epath.Path(path)
    return _parse(file.read_bytes(), file)[0] if file.is_file() else []


def cut_after(path: str | os.PathLike[str], step: int) -> int:
    """Drops the lines of a JSONL file whose step is greater than `step`, and a torn last line.

    A run that continues from the checkpoint of `step` needs this first, so that no step appears
    twice. The file is replaced as a whole or not at all; without the file nothing happens.

    Returns:
      The number of lines dropped.

    Raises:
      InputError: a line before the last is not a JSON object, or the folder cannot be written.
    """
    file = epath.Path(path)
    if not file.is_file():
        return 0
    data = file.read_bytes()
    rows, torn = _parse(data, file)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if len(kept) < len(rows) or torn or (data and not data.endswith(b"\n")):
        with disk_errors(file.parent):
            replace_file(file, b"".join(_encode(row) for row in kept))
    return len(rows) - len(kept) + torn


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that it holds, whatever happens, all of its old or all of its new content.

    Raises:
      OSError: it cannot be written; the old content is still there.
    """
    target = epath.Path(path)
    if _is_remote(target):
        target.write_bytes(data)  # an object store shows an object only once it is whole
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


class MetricsWriter:
    """Appends the metrics and samples of a run to its folder; a context manager.

    With several hosts only process 0 makes one. Each line is handed to the system before the call
    returns. On an object store (`gs://`), where nothing can be appended to, the lines are kept in
    memory and the object is rewritten at most once a minute and at the end.

    Args:
      run_dir: the folder of the run; made if missing.
      settings: the `logging` section.
      config: the resolved configuration, shown by W&B.
      name: the name of the run in W&B.
      initial_step: the step of the checkpoint that the run continues from, 0 for a fresh start:
        what an earlier attempt wrote past it is cut from the two JSONL files and hidden in
        TensorBoard. With None all whole lines stay.

    Raises:
      InputError: the folder cannot be written, or a package asked for is not installed.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with MetricsWriter(folder, Settings(tensorboard=False), {}, name="demo") as writer:
    ...     writer.write(1, {"train/loss": 2.5, "train/grad_norm": math.nan})
    >>> [row["train/grad_norm"] for row in read_lines(f"{folder}/metrics.jsonl")]
    ['NaN']
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        settings: Settings,
        config: Mapping[str, Any],
        *,
        name: str,
        initial_step: int | None = None,
    ) -> None:
        _require("wandb", settings.wandb)
        _require("tensorboardX", settings.tensorboard, "tensorboard")
        self.run_dir = epath.Path(run_dir)
        with disk_errors(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            last = sys.maxsize if initial_step is None else initial_step
            for file in ("metrics.jsonl", "samples.jsonl"):
                cut_after(self.run_dir / file, last)
            self._metrics = _Lines(self.run_dir / "metrics.jsonl")
            self._samples = _Lines(self.run_dir / "samples.jsonl")
            self._board = (
                _TensorBoard(self.run_dir / "tensorboard", initial_step)
                if settings.tensorboard
                else None
            )
        self._wandb = _start_wandb(self.run_dir, settings, config, name) if settings.wandb else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to `metrics.jsonl`: `step`, `time` (seconds since 1970), the metrics.

        Values are anything that `float` takes. JSON has no NaN and no infinities: they are written
        as the strings "NaN", "Infinity" and "-Infinity", which `float` (and JavaScript's `Number`)
        reads back.

        Raises:
          InputError: the folder cannot be written.
        """
        values = {key: float(value) for key, value in metrics.items()}
        now = time.time()
        with disk_errors(self.run_dir):
            self._metrics.append({"step": int(step), "time": round(now, 3), **values})
            if self._board is not None:
                self._board.add(int(step), now, values)
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Appends rows (prompt, response, score, kl ...) to `samples.jsonl`, each with its step.

        Raises:
          InputError: the folder cannot be written.
        """
        with disk_errors(self.run_dir):
            for row in rows:
                self._samples.append({"step": int(step), **row})

    def flush(self) -> None:
        """Brings the lines to an object store as well, where they wait in memory otherwise.

        A checkpoint that follows then continues from a step that has all its lines.

        Raises:
          InputError: the folder cannot be written.
        """
        with disk_errors(self.run_dir):
            self._metrics.flush()
            self._samples.flush()

    def close(self) -> None:
        """Finishes all outputs; called on leaving the `with` block.

        Raises:
          InputError: what was still to be written does not fit.
        """
        with contextlib.ExitStack() as outputs, disk_errors(self.run_dir):
            if self._wandb is not None:
                outputs.callback(self._wandb.finish)
            if self._board is not None:
                outputs.callback(self._board.close)
            outputs.callback(self._samples.flush)
            outputs.callback(self._metrics.flush)
            outputs.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # A full disk fails here a second time; the error on its way out has said so already.
        with contextlib.suppress(InputError):
            self.close()


class NoWriter:
    """In place of a `MetricsWriter` on the hosts that write nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class _Lines:
    """One JSONL file that grows.

    Locally each line opens the file, appends and closes it: no buffer outlives a failure.
    """

    REMOTE_SECONDS = 60.0

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._remote = _is_remote(path)
        self._content = path.read_bytes() if self._remote and path.exists() else b""
        self._unsaved, self._saved_time = False, time.monotonic()

    def append(self, row: Mapping[str, Any]) -> None:
        if not self._remote:
            with open(self._path, "ab") as file:
                file.write(_encode(row))
            return
        self._content += _encode(row)
        self._unsaved = True
        if time.monotonic() - self._saved_time >= self.REMOTE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._unsaved:
            self._path.write_bytes(self._content)
            self._unsaved, self._saved_time = False, time.monotonic()


class _TensorBoard:
    """Scalars in one event file.

    tensorboardX's own `SummaryWriter` writes from a thread that dies on a full disk, after which
    the next calls wait for it for ever; its `RecordWriter` writes where an error can be seen.
    """

    FLUSH_SECONDS = 30.0

    def __init__(self, folder: epath.Path, initial_step: int | None) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = event_pb2, summary_pb2.Summary
        # TensorBoard reads the files in the order of their names: the time comes first.
        name = f"events.out.tfevents.{int(time.time())}.{uuid.uuid4().hex}"
        self._writer = RecordWriter(str(folder / name))
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._flushed = -math.inf
        if initial_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            now = time.time()
            self._write(event_pb2.Event(wall_time=now, step=initial_step + 1, session_log=start))

    def add(self, step: int, now: float, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        summary = self._summary(value=scalars)
        self._write(self._event.Event(wall_time=now, step=step, summary=summary))
        if now - self._flushed >= self.FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = now

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def _require(package: str, asked: bool, key: str | None = None) -> None:
    if asked and importlib.util.find_spec(package) is None:
        key = f"logging.{key or package}"
        raise InputError(
            f"{key} is true, but {package} is not installed; "
            f"run `pip install {package}` or set --{key} false"
        )


def _start_wandb(
    run_dir: epath.Path, settings: Settings, config: Mapping[str, Any], name: str
) -> Any:
    import wandb

    # The identity is kept in the folder, so that a continued run goes on in the same W&B run.
    identity = run_dir / "wandb_id.txt"
    with disk_errors(run_dir):
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12])
        run_id = identity.read_text()
    return wandb.init(
        project=settings.wandb_project,
        name=name,
        config=dict(config),
        id=run_id,
        resume="allow",
        dir=None if _is_remote(run_dir) else str(run_dir),
    )


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _encode(row: Mapping[str, Any]) -> bytes:
    """One line of JSON; `backslashreplace` writes a lone surrogate as the JSON escape it is."""
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it is read back from its line."""
    return json.loads(_encode(row))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):  # a scalar or an array of NumPy or JAX
        return _finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _parse(data: bytes, path: epath.Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a JSONL file, and whether a torn last line was left out."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise InputError(
                f"line {number} of {path} is not a JSON object; "
                "delete that line or give another --run_dir"
            )
    return rows, len(rows) < len(lines)
