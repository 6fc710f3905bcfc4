"""Programs that are kept on disk: where, when not, and what a damaged or a full folder does."""

import contextlib
import os
import resource
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from rlhf_jax.runtime.commands import compilation_cache, terminal
from rlhf_jax.runtime.commands.compilation_cache import SETTINGS, keep_compiled
from rlhf_jax.runtime.commands.main import main
from rlhf_jax.runtime.run.stage import StageResult

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
DEFAULTS = {
    "jax_compilation_cache_dir": None,
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
    "jax_compilation_cache_max_size": -1,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home of a user without settings of JAX."""
    before = {name: getattr(jax.config, name) for name in DEFAULTS}
    _set(DEFAULTS)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", *(name.upper() for name in SETTINGS)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compilation_cache, "QUIET_ON_CPU", (0,))
    with warnings.catch_warnings():
        yield tmp_path
    _set(before)


def _set(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def kept(folder):
    return sorted(folder.glob("*-cache"))


def program(number):
    """A program that gives back its argument's memory; JAX has not seen it, but the disk may."""
    return jax.jit(lambda x: jnp.sin(x @ x) + number, donate_argnums=0)


def outcome(number):
    """(result, the reads of JAX from the disk)"""
    events = []

    def listen(name, **more):
        if name in (HIT, MISS):
            events.append(name)

    x = jax.device_put(np.linspace(0.0, 1.0, 64, dtype=np.float32).reshape(8, 8))
    jax.monitoring.register_event_listener(listen)
    try:
        return np.asarray(program(number)(x)), events
    finally:
        jax.monitoring.unregister_event_listener(listen)


def test_programs_are_kept_in_the_cache_folder_of_the_user(home, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_cores", lambda: 3)
    folder = home / ".cache" / "rlhf-jax" / "xla" / "3-cores"
    assert keep_compiled() == folder
    ours = (folder, folder.parent, folder.parent.parent)
    assert [place.stat().st_mode & 0o777 for place in ours] == [0o700] * 3
    assert (home / ".cache").stat().st_mode & 0o777 == 0o777 & ~umask()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert {name: getattr(jax.config, name) for name in SETTINGS} == SETTINGS
    _set(DEFAULTS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
    assert keep_compiled() == home / "elsewhere" / "rlhf-jax" / "xla" / "3-cores"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_a_command_makes_the_folder_once_its_settings_are_known(home, monkeypatch):
    monkeypatch.setattr(terminal, "_set_up_logging", lambda: None)  # caplog would hear nothing then
    monkeypatch.setattr("sys.path", [*sys.path])
    assert main(["sft", "--sft.batch_size", "none"]) == 2
    assert not list(home.iterdir())
    result = StageResult(str(home / "run"), {})
    monkeypatch.setattr("rlhf_jax.runtime.commands.main.train", lambda trainer, config: result)
    assert main(["sft"]) == 0
    assert kept(home / ".cache" / "rlhf-jax") == []
    assert (home / ".cache" / "rlhf-jax" / "xla").is_dir()


@pytest.mark.parametrize(
    "settings",
    [
        {"jax_compilation_cache_dir": "there"},
        {"jax_compilation_cache_dir": ""},
        {"jax_enable_compilation_cache": False},
    ],
    ids=str,
)
def test_settings_of_the_user_come_first(home, settings):
    _set(settings)
    assert keep_compiled() is None
    assert {name: getattr(jax.config, name) for name in DEFAULTS} == DEFAULTS | settings
    assert not list(home.iterdir())


def test_a_user_without_a_home_or_without_room_has_none(home, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(home / "none"))
    assert keep_compiled() is None
    assert not list(home.iterdir())
    assert not caplog.records
    monkeypatch.setenv("HOME", str(home))
    (home / ".cache").write_text("a file is in the way")
    assert keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir is None
    (record,) = caplog.records
    assert "-cores cannot be written; set JAX_COMPILATION_CACHE_DIR" in record.getMessage()


def test_older_jax_keeps_programs_for_accelerators_alone(monkeypatch):
    reads_quietly = compilation_cache._reads_quietly
    assert reads_quietly((0, 12, 0), "cpu")
    monkeypatch.setattr(compilation_cache, "ACCELERATORS", ("no_such_plugin",))
    assert not reads_quietly((0, 10, 0), None)
    monkeypatch.setattr(compilation_cache, "ACCELERATORS", ("no_such_plugin", "json"))
    assert reads_quietly((0, 10, 0), None)
    assert not reads_quietly((0, 10, 0), "cpu")


def test_a_kept_program_gives_the_same_and_a_damaged_one_is_compiled_again(home, monkeypatch):
    monkeypatch.setitem(SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.simplefilter("error")
    folder = keep_compiled()
    first, events = outcome(1.0)
    assert events.count(MISS) == len(kept(folder)) >= 1
    again, events = outcome(1.0)
    assert MISS not in events
    assert HIT in events
    np.testing.assert_array_equal(first, again)
    for file in kept(folder):
        file.write_bytes(file.read_bytes()[:100])
    damaged, events = outcome(1.0)
    assert HIT not in events
    np.testing.assert_array_equal(first, damaged)


def test_programs_that_a_full_disk_cut_short_are_compiled_again(home, monkeypatch):
    monkeypatch.setitem(SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.simplefilter("error")
    folder = keep_compiled()
    with room_for(64):
        first, _ = outcome(2.0)
    cut_short = kept(folder)
    assert {file.stat().st_size for file in cut_short} == {64}
    _set(DEFAULTS)
    keep_compiled()
    assert kept(folder) == cut_short  # another process may be writing them
    for file in cut_short:
        os.utime(file, (0.0, 0.0))
    _set(DEFAULTS)
    keep_compiled()
    assert not kept(folder)
    anew, events = outcome(2.0)
    assert events.count(MISS) == len(kept(folder)) >= 1
    np.testing.assert_array_equal(first, anew)


@contextlib.contextmanager
def room_for(size):
    """No file can grow beyond this number of bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_least_recently_read_program_is_removed_from_a_full_folder(home, monkeypatch):
    monkeypatch.setitem(SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    folder = keep_compiled()
    outcome(3.0)
    outcome(4.0)
    outcome(3.0)
    room = sum(file.stat().st_size for file in kept(folder)) + 100
    _set({"jax_compilation_cache_max_size": room})
    outcome(5.0)
    assert 0 < sum(file.stat().st_size for file in kept(folder)) <= room
    assert HIT in outcome(3.0)[1]
    assert MISS in outcome(4.0)[1]
