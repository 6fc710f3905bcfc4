"""The section `rloo` of a configuration, and the record of RLOO: GRPO with other defaults."""

import dataclasses
from typing import Literal

from rlhf_jax.checks import NonNegativeFloat, PositiveInt
from rlhf_jax.training import grpo_settings
from rlhf_jax.training.grpo_settings import LossType


@dataclasses.dataclass(frozen=True)
class Settings(grpo_settings.Settings):
    """The section `rloo` of a configuration: the settings of `grpo` with TRL's defaults of RLOO.

    The baseline of a response is the mean score of the other responses to its prompt; the KL is
    part of the reward, and the ratio is that of the entire response.

    Ahmadian et al., Back to Basics: Revisiting REINFORCE Style Optimization (arXiv:2402.14740).
    """

    section = "rloo"  # of the configuration; without an annotation it is no field

    num_generations: PositiveInt = 2
    loss_type: LossType = "rloo"
    advantage_estimator: Literal["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "rloo"
    beta: NonNegativeFloat = 0.05
    kl_in: Literal["loss", "reward"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"


TRAINER = dataclasses.replace(
    grpo_settings.TRAINER,
    name="rloo",
    title="RLOO",
    label="RLOO",
    summary="policy gradients against the mean score of the other responses to a prompt",
    settings=Settings,
    module="rlhf_jax.training.grpo",
)
