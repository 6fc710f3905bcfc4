"""Metrics that a run writes: lines that read back, a full disk, TensorBoard and W&B."""

import dataclasses
import errno
import json
import math
import os
import sys
import types

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.run import metrics
from rlhf_jax.runtime.run.folder import read_lines
from rlhf_jax.runtime.run.metrics import MetricsWriter
from rlhf_jax.runtime.run.settings import LoggingSettings
from tests import small
from tests.runtime.run.test_folder import write_steps

PLAIN, BOARD = LoggingSettings(), LoggingSettings(tensorboard=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("log_every", 0), ("eval_every", -1), ("samples_every", -1), ("num_samples", -2)],
)
def test_settings_name_the_key_that_is_wrong(name, value):
    with pytest.raises(InputError, match=f"logging.{name} must .*, but is {value}."):
        LoggingSettings(**{name: value})


def test_settings_need_a_project_for_wandb():
    with pytest.raises(InputError, match="logging.wandb_project is empty"):
        LoggingSettings(wandb=True, wandb_project="")
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoggingSettings().log_every = 2


def test_lines_are_valid_json_and_read_back_exactly(tmp_path):
    values = {"a": 0.1, "b": np.float32(0.1), "nan": math.nan, "up": math.inf, "down": -math.inf}
    with MetricsWriter(tmp_path / "new" / "run", PLAIN, {}, name="x") as writer:
        writer.write(np.int32(3), values)
        # On disk before the writer is closed.
        text = (tmp_path / "new/run/metrics.jsonl").read_text()
    entry = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert entry["step"] == 3
    assert entry["time"] > 1e9
    for name, value in values.items():
        np.testing.assert_equal(float(entry[name]), float(value))


def test_samples_keep_every_character(tmp_path):
    text = 'é \u2028 \ud800 "quoted"\nsecond line \U0001f600'
    with MetricsWriter(tmp_path, PLAIN, {}, name="x") as writer:
        writer.samples(5, [{"prompt": text, "score": np.float32(1.5), "kl": math.nan}])
    assert read_lines(tmp_path / "samples.jsonl") == [
        {"step": 5, "prompt": text, "score": 1.5, "kl": "NaN"}
    ]


def test_a_writer_cuts_what_an_earlier_attempt_wrote_past_the_checkpoint(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        write_steps(tmp_path / name, [1, 2, 3], b'{"st')
    with MetricsWriter(tmp_path, PLAIN, {}, name="x", initial_step=2) as writer:
        writer.write(3, {"x": 1.0})
    assert [entry["step"] for entry in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [entry["step"] for entry in read_lines(tmp_path / "samples.jsonl")] == [1, 2]


def test_a_writer_without_an_initial_step_keeps_all_complete_lines(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", [1, 2, 3], b'{"st')
    with MetricsWriter(tmp_path, PLAIN, {}, name="x") as writer:
        writer.write(4, {"x": 1.0})
    assert [entry["step"] for entry in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def write_both(writer):
    with writer:
        for step in range(100):
            writer.write(step, {"x": 1.0})
            writer.samples(step, [{"prompt": "p"}])


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")


@needs_full
@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_is_one_sentence(tmp_path, file):
    writer = MetricsWriter(tmp_path, PLAIN, {}, name="x")
    (tmp_path / file).symlink_to("/dev/full")
    with pytest.raises(InputError) as error:
        write_both(writer)
    assert str(error.value) == (
        f"cannot write to {tmp_path}: No space left on device; free some space and run the same "
        "command again: it continues from the last checkpoint"
    )
    assert error.value.__cause__.errno == errno.ENOSPC


@needs_full
def test_a_full_disk_under_tensorboard_neither_hangs_nor_hides(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    from tensorboardX import record_writer

    open_file = record_writer.open_file
    monkeypatch.setattr(record_writer, "open_file", lambda path: open_file("/dev/full"))
    writer = MetricsWriter(tmp_path, BOARD, {}, name="x")
    with pytest.raises(InputError, match="No space left on device"):
        write_both(writer)


def test_an_error_of_the_block_is_not_hidden_by_one_of_closing(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, PLAIN, {}, name="x")
    monkeypatch.setattr(writer._metrics, "flush", small.no_space)
    with pytest.raises(KeyError), writer:
        raise KeyError("x")
    with pytest.raises(InputError, match="No space left on device"), writer:
        pass


def test_a_run_dir_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="cannot write to .*run: .*give another --run_dir"):
        MetricsWriter(tmp_path / "run", PLAIN, {}, name="x")


def test_an_object_store_gets_complete_objects(tmp_path, monkeypatch):
    # A local folder plays the store.
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, PLAIN, {}, name="x") as writer:
        writer.write(1, {"x": 1.0})
        assert not path.exists()
    with MetricsWriter(tmp_path, PLAIN, {}, name="x", initial_step=1) as writer:
        monkeypatch.setattr(metrics._Lines, "REMOTE_SECONDS", 0.0)
        writer.write(2, {"x": 1.0})
        assert [entry["step"] for entry in read_lines(path)] == [1, 2]


def read_events(folder):
    """The events of all files of a TensorBoard folder, read by the record format itself."""
    from tensorboardX.proto import event_pb2

    events = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return events


def test_tensorboard_gets_the_same_numbers_and_hides_the_repeated_ones(tmp_path):
    pytest.importorskip("tensorboardX")
    for initial_step in (0, 1):  # two writers within one second do not share a file
        with MetricsWriter(tmp_path, BOARD, {}, name="x", initial_step=initial_step) as writer:
            writer.write(initial_step + 1, {"train/loss": 0.5 + initial_step})
    events = read_events(tmp_path / "tensorboard")
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert sorted(values) == [(1, "train/loss", 0.5), (2, "train/loss", 1.5)]
    assert {e.step for e in events if e.HasField("session_log")} == {1, 2}


@pytest.mark.parametrize(("key", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, key, package):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    settings = LoggingSettings(**{key: True})
    with pytest.raises(InputError, match=f"logging.{key} is true, but {package} is not installed"):
        MetricsWriter(tmp_path / "run", settings, {}, name="x")
    assert not (tmp_path / "run").exists()


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    fake = types.ModuleType("wandb")
    fake.init, fake.__spec__ = init, types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = LoggingSettings(wandb=True, wandb_project="p")
    for _ in range(2):
        with MetricsWriter(tmp_path, settings, {"seed": 1}, name="n") as writer:
            writer.write(7, {"x": 1.0})
    first, second = calls[0], calls[3]
    assert first == second
    assert (first["project"], first["name"], first["config"]) == ("p", "n", {"seed": 1})
    assert calls[1:3] == [(7, {"x": 1.0}), "finish"]
