"""A stage without a model, for tests of the loop: its state is an array, and a step is one sum."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.parallel import make_mesh
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.runtime.run import loop
from rlhf_jax.runtime.run.folder import disk_errors
from rlhf_jax.runtime.run.settings import CheckpointSettings, LoggingSettings
from tests import small

EXAMPLES = 5
SIZE = 40_000  # floats, which do not compress


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Stands in for the section `distributed`, which a run folder does not keep."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration with all that a run needs."""

    rate: float = 0.5
    steps: int = small.STEPS
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    distributed: Distributed = Distributed()
    run_dir: str = "-"

    length_settings: ClassVar[tuple[str, ...]] = ("steps",)


@jax.jit
def initial(key):
    return {"x": jax.random.normal(key, (SIZE,)), "count": jnp.zeros((), jnp.int32)}


def update(state, rate, index):
    x = state["x"] * (1 - rate) + index
    metrics = {"train/loss": jnp.mean(x**2), "train/grad_norm": rate, "perf/tokens": 10.0}
    return {"x": x, "count": state["count"] + 1}, metrics, x[:4]


update = jax.jit(update, donate_argnums=0)


def fingerprints():
    return {"The data in counting": {"the number of examples": EXAMPLES}}


class CountingStage:
    """Its samples are made of the state; see `loop.Stage`."""

    name = "counting"
    losses = ("train/loss",)
    scores = {"own/score": "own score"}
    schedule = "linear"
    flops_per_token = flops_per_step = 0.0

    def __init__(self, config):
        self.config, self.mesh = config, make_mesh(MeshSettings())
        self.total_steps, self.fingerprints = config.steps, fingerprints()

    def init_state(self):
        return initial(jax.random.key(0))

    def step(self, state, index):
        state, metrics, _ = update(state, self.config.rate, index)
        return state, metrics, None

    def observe(self, output):
        return {"observed": 1.0}

    def evaluate(self, state):
        return {"eval/loss": float(jnp.mean(state["x"])), "eval/accuracy": 0.5}

    def samples(self, state, output, count):
        return [{"response": str(x)} for x in np.asarray(state["x"][:count])]

    def saved(self, state):
        return state

    def resumed(self, state, saved):
        return saved

    def finish(self, state):
        folder = Path(self.config.run_dir)
        with disk_errors(folder):
            write_hf(folder / "hf", state)
            (folder / "report.html").write_text("<html></html>")
        return folder / "report.html"


def write_hf(folder, state):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(np.asarray(state["x"]).tobytes())
    (folder / "config.json").write_text(json.dumps({"count": int(state["count"])}))


class SamplingStage(CountingStage):
    """Its samples are made of a step's output, as those of PPO are."""

    def step(self, state, index):
        return update(state, self.config.rate, index)

    def observe(self, output):
        return {"observed": float(output[0])}

    def samples(self, state, output, count):
        return [] if output is None else [{"response": str(x)} for x in np.asarray(output[:count])]


def train(run_dir, stage=CountingStage, *, logging=None, checkpoint=None, **settings):
    """A run of four steps in a folder; evaluations, samples and logs as in `small`."""
    logging = LoggingSettings(**{**small.LOGGING, **(logging or {})})
    checkpoint = CheckpointSettings(**checkpoint or {})
    config = Config(logging=logging, checkpoint=checkpoint, run_dir=str(run_dir), **settings)
    return loop.run(lambda: stage(config), config, fingerprints)
