"""Trainers: each is a pure, uncompiled step with its settings, in a file of its name.

`TRAINERS` holds their records. Importing this imports no jax; a trainer's steps are imported when
they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from rlhf_jax.lazy import lazy_names
from rlhf_jax.training.trainer import Trainer

if TYPE_CHECKING:
    from rlhf_jax.training.settings import OptimizerSettings as OptimizerSettings
    from rlhf_jax.training.state import TrainState as TrainState
    from rlhf_jax.training.state import make_optimizer as make_optimizer

# The files with their records. The random keys of a trainer derive from its place here: append new
# ones at the end.
TRAINERS: tuple[Trainer, ...] = tuple(
    importlib.import_module(f"rlhf_jax.training.{file}").TRAINER
    for file in (
        "sft_settings",
        "reward_settings",
        "ppo_settings",
        "dpo_settings",
        "kto_settings",
        "online_dpo_settings",
        "rft_settings",
        "grpo_settings",
        "rloo_settings",
    )
)

__getattr__, __dir__, __all__ = lazy_names(__name__)
