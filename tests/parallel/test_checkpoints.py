"""A run that was saved on one device goes on on eight, and back."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.runtime import train_sft
from rlhf_jax.runtime.run.signals import Interrupted
from rlhf_jax.runtime.stages.offline import OfflineStage
from tests import small

pytestmark = [pytest.mark.slow, pytest.mark.newest]

ROOT = Path(__file__).resolve().parents[2]


def config(folder, mesh):
    """A run of four steps that is evaluated nowhere."""
    logging = {"eval_every": 0, "samples_every": 0, "num_samples": 0, "progress": False}
    model = {"dropout": 0.0}
    return small.sft(folder, mesh=mesh, logging=logging, data={"eval_rows": 0}, model=model)


def stop_in_first(self, state, index):
    if index == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return STEP(self, state, index)


STEP = OfflineStage.step


def test_from_one_device_to_eight_and_back(tmp_path, monkeypatch):
    """Each restore compares the checksums, which are sums over all devices, with those saved."""
    one = {"data": 1}
    train_sft(config(tmp_path / "full", one))
    with monkeypatch.context() as patch:
        patch.setattr(OfflineStage, "step", stop_in_first)
        with pytest.raises(Interrupted, match="after step 1 of 4"):
            train_sft(config(tmp_path / "parts", one))
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.continue_on_eight", str(tmp_path / "parts")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    share, message = done.stdout.splitlines() or [done.stderr[-4000:], ""]
    assert float(share.removeprefix("share ")) < 0.3  # of four shards; small arrays are replicated
    assert message.startswith("Stopped after step 3 of 4"), done.stderr[-4000:]
    train_sft(config(tmp_path / "parts", one))
    full, parts = (small.entries(tmp_path / name / "metrics.jsonl") for name in ("full", "parts"))
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert parts[0] == full[0]
    for expected, actual in zip(full, parts, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
