"""The run folder: JSONL files that are cut and read back, and errors of the disk."""

import errno
import os

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.run import folder
from tests import small
from tests.runtime.run import counting


def write_steps(path, steps, tail=b""):
    lines = b"".join(b'{"step": %d, "x": 0.5}\n' % step for step in steps)
    path.write_bytes(lines + tail)


@pytest.mark.parametrize("tail", [b"", b'{"step": 2, "x"', b'{"step": 3, "x": "\xc3', b"\0\0\0"])
def test_cut_after_drops_later_and_torn_lines(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 2, 3, 4], tail)
    with path.open("rb") as old:  # replaced, not overwritten: who has the old file open keeps it
        folder.cut_after(path, 2)
        assert b'"step": 4' in old.read()
    assert [entry["step"] for entry in folder.read_lines(path)] == [1, 2, 2]
    assert path.read_bytes().endswith(b"\n")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_cut_after_leaves_alone_what_needs_no_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    folder.cut_after(path, 2)
    assert not path.exists()
    write_steps(path, [1, 2])
    before = path.stat()
    folder.cut_after(path, 2)
    assert path.stat().st_ino == before.st_ino


def test_cut_after_ends_a_complete_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1], b'{"step": 2}')
    folder.cut_after(path, 2)
    assert path.read_bytes().endswith(b'{"step": 2}\n')


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"line 2 of .*metrics.jsonl is not a JSON object"):
        folder.cut_after(path, 2)
    assert path.read_text().count("\n") == 3


def test_a_failed_cut_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    content = path.read_bytes()

    monkeypatch.setattr(os, "fsync", small.no_space)
    with pytest.raises(InputError, match="No space left on device"):
        folder.cut_after(path, 1)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "give another --run_dir"),
        (errno.EIO, "mend"),
    ],
)
def test_disk_errors_say_what_to_do(code, remedy):
    with (
        pytest.raises(InputError, match=f"cannot write to here: .*{remedy}"),
        folder.disk_errors("here"),
    ):
        raise OSError(code, os.strerror(code))


def test_a_full_disk_is_named_beside_the_remedy_of_an_output():
    with (
        pytest.raises(InputError, match="space left on device; free some space, or give another"),
        folder.disk_errors("here", "give another --output"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_errors_let_other_errors_pass():
    with pytest.raises(KeyError), folder.disk_errors("here"):
        raise KeyError("x")


def test_an_evaluation_after_a_restart_is_merged_into_its_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "time": 1.0, "train/loss": 2.0}\n'
        '{"step": 2, "time": 2.0, "eval/loss": "NaN", "best/step": 1.0}\n'
        '{"step": 3, "time": 3.0, "train/loss": 1.0, "eval/loss": 0.5}\n'
    )
    (tmp_path / "samples.jsonl").write_text('{"step": 3, "response": ""}\n')
    evaluations, has_samples = folder.read_progress(tmp_path, 2)
    assert str(evaluations) == "{2: {'eval/loss': nan}}"
    assert not has_samples
    assert folder.read_progress(tmp_path, 3)[0][3] == {"eval/loss": 0.5}
    assert folder.read_progress(tmp_path, 3)[1]
    last = {"step": 3.0, "train/loss": 1.0, "eval/loss": 0.5, "best/step": 1.0}
    assert folder.last_metrics(tmp_path) == last


def test_a_run_is_finished_when_its_model_and_its_report_are_there(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").touch()
    config = counting.Config(run_dir=str(tmp_path))
    assert not folder.is_finished(config)
    (tmp_path / "report.html").touch()
    assert folder.is_finished(config)
