"""Outputs of a run while it trains: JSONL files, TensorBoard, W&B.

Continuing a run and its report rely on `metrics.jsonl` and `samples.jsonl`; the other outputs are
copies of them for watching.
"""

import contextlib
import importlib.util
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.parsing import to_dict
from rlhf_jax.runtime.run.folder import cut_after, disk_errors, encode_line, is_remote
from rlhf_jax.runtime.run.settings import LoggingSettings


class MetricsWriter:
    """Appends the metrics and samples of a run to its folder; a context manager.

    Each line is written before the call returns. On an object store (`gs://`), which cannot append,
    the lines are kept in memory and the object is rewritten at most once a minute and at the end.

    Args:
      run_dir: the folder of the run; created if missing.
      settings: the `logging` section.
      config: the resolved configuration, shown by W&B.
      name: the name of the run in W&B.
      initial_step: the step of the checkpoint that the run continues from, 0 for a fresh start:
        later lines of an earlier attempt are cut from the two JSONL files and hidden in
        TensorBoard. With None all complete lines stay.

    Raises:
      InputError: the folder cannot be written, here or in a method, or a package of `settings` is
        not installed.

    >>> import json, pathlib, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with MetricsWriter(folder, LoggingSettings(), {}, name="demo") as writer:
    ...     writer.write(1, {"train/loss": 2.5, "train/grad_norm": math.nan})
    >>> json.loads(pathlib.Path(folder, "metrics.jsonl").read_text())["train/grad_norm"]
    'NaN'
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        settings: LoggingSettings,
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
            self._metrics = _Lines(self.run_dir / "metrics.jsonl", last)
            self._samples = _Lines(self.run_dir / "samples.jsonl", last)
            self._board = self._wandb = None
            if settings.tensorboard:
                self._board = _TensorBoard(self.run_dir / "tensorboard", initial_step)
        if settings.wandb:
            self._wandb = _start_wandb(self.run_dir, settings, config, name)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to `metrics.jsonl`: `step`, `time` (seconds since 1970), the metrics.

        JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity" and
        "-Infinity", which `float` (and JavaScript's `Number`) reads.
        """
        values = {key: float(value) for key, value in metrics.items()}
        now = time.time()
        with disk_errors(self.run_dir):
            self._metrics.append({"step": int(step), "time": round(now, 3), **values})
            if self._board is not None:
                self._board.add(int(step), now, values)
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends samples (prompt, response, score, kl ...) to `samples.jsonl`, with the step."""
        with disk_errors(self.run_dir):
            for sample in samples:
                self._samples.append({"step": int(step), **sample})

    def flush(self) -> None:
        """Writes the lines kept in memory for an object store, so before each checkpoint."""
        with disk_errors(self.run_dir):
            self._metrics.flush()
            self._samples.flush()

    def close(self) -> None:
        """Closes all outputs; called on leaving the `with` block."""
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
        # A full disk raises here a second time; the first error is the one to report.
        with contextlib.suppress(InputError) if kind else contextlib.nullcontext():
            self.close()


def make_writer(config: Any, name: str, initial_step: int) -> "MetricsWriter | NoWriter":
    """The writer of a run with this configuration; other hosts than the first have a `NoWriter`."""
    if not hosts.is_first():
        return NoWriter()
    return MetricsWriter(
        config.run_dir, config.logging, to_dict(config), name=name, initial_step=initial_step
    )


class NoWriter:
    """Stands in for a `MetricsWriter` on hosts other than the first; writes nothing."""

    def write(self, *_: object) -> None:
        """Does nothing."""

    samples = flush = __exit__ = write

    def __enter__(self) -> "NoWriter":
        return self


class _Lines:
    """Appends to one JSONL file, of which later lines than those of the step `last` are cut.

    Locally each line opens the file, appends and closes it: no buffer survives a failure.
    """

    REMOTE_SECONDS = 60.0

    def __init__(self, path: epath.Path, last: int) -> None:
        cut_after(path, last)
        self._path = path
        self._remote = is_remote(path)
        self._content = path.read_bytes() if self._remote and path.exists() else b""
        self._unsaved, self._saved_time = False, time.monotonic()

    def append(self, entry: Mapping[str, Any]) -> None:
        if not self._remote:
            with open(self._path, "ab") as file:
                file.write(encode_line(entry))
            return
        self._content += encode_line(entry)
        self._unsaved = True
        if time.monotonic() - self._saved_time >= self.REMOTE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._unsaved:
            self._path.write_bytes(self._content)
            self._unsaved, self._saved_time = False, time.monotonic()


class _TensorBoard:
    """Scalars in one event file.

    The thread of tensorboardX's `SummaryWriter` dies on a full disk, and the next calls wait for it
    for ever; its `RecordWriter` writes in the calling thread, and raises.
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


def _require(package: str, enabled: bool, key: str | None = None) -> None:
    if enabled and importlib.util.find_spec(package) is None:
        key = f"logging.{key or package}"
        raise InputError(
            f"{key} is true, but {package} is not installed; "
            f"run `pip install {package}` or set --{key} false"
        )


def _start_wandb(
    run_dir: epath.Path, settings: LoggingSettings, config: Mapping[str, Any], name: str
) -> Any:
    import wandb

    # The id is kept in the folder, so that a continued run is the same W&B run.
    id_file = run_dir / "wandb_id.txt"
    with disk_errors(run_dir):
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        run_id = id_file.read_text()
    return wandb.init(
        project=settings.wandb_project,
        name=name,
        config=dict(config),
        id=run_id,
        resume="allow",
        dir=None if is_remote(run_dir) else str(run_dir),
    )
