"""One process writes a run folder, and notices if it is no longer there."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.run import lock
from tests.runtime.messages import message
from tests.runtime.run import counting

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
    import os, sys, time
    from rlhf_jax.runtime.run.lock import locked

    with locked(sys.argv[1]):
        if os.fork() == 0:  # a child that has the lock's file open, and outlives its parent
            time.sleep(float(sys.argv[2]))
            os._exit(0)
        print("locked", flush=True)
        time.sleep(60)
"""


def acquire(folder):
    with lock.locked(str(folder)):
        pass


@pytest.mark.parametrize("seconds_of_child", [0, 30])
def test_another_process_is_named_until_it_is_dead(tmp_path, seconds_of_child):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder), str(seconds_of_child)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    said = message(acquire, folder)
    who = f"process {process.pid} on {socket.gethostname()}, since "
    assert said.startswith(f"Another process writes the run folder {folder}: {who}")
    assert said.endswith(
        f"; wait for its end, or choose another --run_dir; if it has ended, delete {folder}/lock."
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    acquire(folder)
    assert os.listdir(folder) == []


def test_a_run_refuses_a_folder_in_use_before_it_writes_there(tmp_path):
    with lock.locked(str(tmp_path)):
        assert f"process {os.getpid()} on" in message(counting.train, tmp_path)
        assert os.listdir(tmp_path) == ["lock"]
    counting.train(tmp_path)
    assert not (tmp_path / "lock").exists()


def test_where_the_file_system_has_no_locks_the_name_in_the_file_decides(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with lock.locked(str(tmp_path)):
        assert f"process {os.getpid()} on" in message(acquire, tmp_path)
    (tmp_path / "lock").write_text(f'{{"host": "{socket.gethostname()}", "pid": 999999999}}')
    acquire(tmp_path)
    (tmp_path / "lock").write_text('{"host": "another", "pid": 1, "since": "today"}')
    assert "process 1 on another, since today" in message(acquire, tmp_path)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_or_replaced_ends_the_run(tmp_path, replaced):
    class Removing(counting.CountingStage):
        def step(self, state, index):
            if index == 2:
                shutil.rmtree(self.config.run_dir)
                if replaced:
                    os.mkdir(self.config.run_dir)
            return super().step(state, index)

    with pytest.raises(InputError) as raised:
        counting.train(tmp_path / "run", Removing)
    assert str(raised.value).startswith(
        f"The run folder {tmp_path}/run was removed, renamed or replaced while the run wrote it"
    )
    assert not replaced or os.listdir(tmp_path / "run") == []
