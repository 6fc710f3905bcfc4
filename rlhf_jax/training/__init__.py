"""Trainers: each is a pure, uncompiled step with its settings, in a file of its name.

`TRAINERS` holds their records. Importing this imports no jax; a trainer's steps are imported when
they are first used.
"""

from typing import TYPE_CHECKING

from rlhf_jax.lazy import lazy_names
from rlhf_jax.training import (
    dpo_settings,
    grpo_settings,
    kto_settings,
    online_dpo_settings,
    ppo_settings,
    reward_settings,
    rft_settings,
    rloo_settings,
    sft_settings,
)
from rlhf_jax.training.trainer import Trainer

if TYPE_CHECKING:
    from rlhf_jax.training.settings import OptimizerSettings as OptimizerSettings
    from rlhf_jax.training.state import TrainState as TrainState
    from rlhf_jax.training.state import make_optimizer as make_optimizer

# The random keys of a trainer derive from its place here: append new ones at the end.
TRAINERS: tuple[Trainer, ...] = (
    sft_settings.TRAINER,
    reward_settings.TRAINER,
    ppo_settings.TRAINER,
    dpo_settings.TRAINER,
    kto_settings.TRAINER,
    online_dpo_settings.TRAINER,
    rft_settings.TRAINER,
    grpo_settings.TRAINER,
    rloo_settings.TRAINER,
)

__getattr__, __dir__, __all__ = lazy_names(__name__)
