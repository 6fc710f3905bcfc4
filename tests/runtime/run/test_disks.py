"""Disks that are full or fail while a run is under way."""

import resource
import shutil
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.runtime.commands import terminal
from rlhf_jax.runtime.evaluation import policies as judging
from rlhf_jax.runtime.run import checkpoint as checkpoints
from rlhf_jax.runtime.run.settings import CheckpointSettings
from tests import small
from tests.runtime.messages import message
from tests.runtime.run import counting
from tests.runtime.run.counting import CountingStage
from tests.runtime.run.test_failures import saved_steps


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_under_a_log(tmp_path, monkeypatch, counting_run, file):
    original, kept = CountingStage.step, tmp_path / "kept"

    def filling_the_disk(self, state, index):
        if index == 2:
            (tmp_path / file).rename(kept)
            (tmp_path / file).symlink_to("/dev/full")
        return original(self, state, index)

    with monkeypatch.context() as patch:
        patch.setattr(CountingStage, "step", filling_the_disk)
        said = message(lambda: counting.train(tmp_path, checkpoint={"every": 1}))
        assert said == (
            f"cannot write to {tmp_path}: No space left on device; free some space and run the "
            "same command again: it continues from the last checkpoint"
        )
    kept.rename(tmp_path / file)
    counting.train(tmp_path)
    small.assert_same_run(counting_run, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 120 kB, and a function that changes its size; only root can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield (
        folder,
        lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(folder)], check=True
        ),
    )
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_under_a_checkpoint(small_disk, counting_run):
    folder, resize = small_disk
    assert message(lambda: counting.train(folder / "run")) == (
        f"cannot write to {folder}/run: No space left on device; free some space and run the same "
        "command again: it continues from the last checkpoint"
    )
    resize("30m")
    counting.train(folder / "run")
    small.assert_same_run(counting_run, folder / "run")


def test_writes_that_were_given_up_print_nothing(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
    for text in ("Event loop is closed", "another one"):
        terminal._unraisable(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(raised.exc_value) for raised in printed] == ["another one"]


def test_a_disk_that_fills_under_a_later_checkpoint_leaves_the_one_before(small_disk, counting_run):
    """The write fails in the background, and the next step raises its error."""
    folder, resize = small_disk
    resize("900k")
    checkpoint = {"every": 1, "keep": 1}
    kept = folder / "kept"
    write = checkpoints.Checkpoints.save

    def filling_the_disk(self, step, *arguments, **keywords):
        if step == 2:
            self.wait()
            kept.write_bytes(bytes(shutil.disk_usage(folder).free - 100_000))
        return write(self, step, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", filling_the_disk)
        said = message(lambda: counting.train(folder / "run", checkpoint=checkpoint))
        assert said == (
            f"cannot write to {folder}/run: No space left on device; free some space and run the "
            "same command again: it continues from the last checkpoint"
        )
    assert "1" in {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    resize("30m")
    counting.train(folder / "run", checkpoint=checkpoint)
    small.assert_same_run(counting_run, folder / "run")
    assert saved_steps(folder / "run") == [4]


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 8 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**23, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_for_a_minute(saved):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        saved.check()


def test_a_failed_write_leaves_the_one_before_however_often_it_is_checked(tmp_path, small_files):
    """Whoever sees the error first, Orbax's thread does not miss it and delete that one."""
    saved = checkpoints.Checkpoints(str(tmp_path), CheckpointSettings(keep=1))
    saved.save(1, {"x": jnp.zeros(2)})
    saved.wait()
    saved.save(2, {"x": jax.random.normal(jax.random.key(0), (2**22,))})  # 16 MiB
    with pytest.raises(Exception, match="File too large|os_error_code='27'"):
        check_for_a_minute(saved)
    assert saved.latest_step() == 1


def no_space_says_orbax(*arguments, **keywords):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing: [os_error_code='28']")


@pytest.mark.parametrize(
    ("module", "name", "how"),
    [
        (counting, "write_hf", small.no_space),
        (checkpoints.ocp.CheckpointManager, "save", no_space_says_orbax),
    ],
)
def test_a_full_disk_at_the_end(tmp_path, monkeypatch, counting_run, module, name, how):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, how)
        assert message(lambda: counting.train(tmp_path)).startswith(
            f"cannot write to {tmp_path}: No space left on device; free some space and run the same"
        )
    counting.train(tmp_path)
    small.assert_same_run(counting_run, tmp_path)
    assert (tmp_path / "report.html").exists()


def test_a_full_disk_under_the_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "replace_file", small.no_space)
    said = message(judging.save_evaluation, str(tmp_path), {"table": []})
    assert said.startswith(f"cannot write to {tmp_path}: No space left on device")


def test_other_errors_of_a_save_are_raised_as_they_are(tmp_path, monkeypatch):
    def broken(*arguments, **keywords):
        raise ValueError("a bug")

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", broken)
    with pytest.raises(ValueError, match="a bug"):
        counting.train(tmp_path)
