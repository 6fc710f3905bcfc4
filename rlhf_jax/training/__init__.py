"""Train steps as pure functions: `sft`, `reward` and `ppo`, each with `init_state`, `make_step`."""

from rlhf_jax.training import ppo, reward, sft
from rlhf_jax.training.state import OptimizerSettings, TrainState, make_optimizer

__all__ = ["OptimizerSettings", "TrainState", "make_optimizer", "ppo", "reward", "sft"]
