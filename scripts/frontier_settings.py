"""The configuration of `scripts/frontier.py`."""

import dataclasses
from typing import Any

from rlhf_jax.checks import PositiveInt, check_divides, check_fields
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.config import SFTConfig
from rlhf_jax.training.ppo_settings import Settings as PPOSettings
from rlhf_jax.training.reward_settings import Settings as RewardSettings
from rlhf_jax.training.settings import OptimizerSettings

# The settings with the coefficients of a method.
COEFFICIENTS = ("dpo_beta", "ipo_beta", "ppo_kl_coef", "ppo_reward_kl_coef")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `frontier` of the configuration.

    Attributes:
      dpo_beta, ipo_beta: coefficients of DPO and IPO, a run for each and each seed.
      sft: adds supervised fine-tuning on the chosen continuations.
      ppo_kl_coef, ppo_reward_kl_coef: those of PPO on the gold score, and on a reward model.
      seeds: of the pairs, of the order of examples and of sampling; the fine-tuned model is one.
      num_prompts: beginnings whose continuations are compared, for each seed.
      num_completions: sampled continuations of each; every two with unequal scores are a pair.
      batch_size: pairs of a step.
      steps: optimizer steps of DPO, IPO, supervised fine-tuning and the reward model.
      num_points: evaluations of a run, at equal distances; the last one is at its end.
      kl_limits: divergences of the table, in nats per continuation.
    """

    section = "frontier"

    dpo_beta: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0, 5.0)
    ipo_beta: tuple[float, ...] = (0.05, 0.1, 0.5)
    sft: bool = True
    ppo_kl_coef: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    ppo_reward_kl_coef: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    num_prompts: PositiveInt = 1024
    num_completions: PositiveInt = 4
    batch_size: PositiveInt = 32
    steps: PositiveInt = 80
    num_points: PositiveInt = 4
    kl_limits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)

    def __post_init__(self) -> None:
        check_fields(self.section, self)
        check_divides(self, "steps", "num_points")
        if self.num_completions < 2:
            raise InputError("frontier.num_completions is 1: two or more can be compared.")


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """The section `optimizer`: of the methods on pairs, of the reward model and of PPO."""

    dpo: OptimizerSettings = OptimizerSettings(learning_rate=5e-4)
    reward: OptimizerSettings = OptimizerSettings(learning_rate=5e-4)
    ppo: OptimizerSettings = OptimizerSettings(learning_rate=5e-4, eps=1e-5)


@dataclasses.dataclass(frozen=True)
class Config:
    """Frontiers of mean gold score and KL divergence.

    Attributes:
      sft: configuration of the fine-tuning; its run is `sft/` in the run folder.
      data: beginnings of texts, for training and held out.
      gold: the gold score, "module:function" of f(prompts, completions) -> one number each.
      reward: settings of the reward model.
      ppo: settings of PPO and of all sampling; `kl_coef` is that of each run.
      run_dir: the folder of `points.jsonl`, `frontier.svg` and `sft/`.
    """

    sft: SFTConfig = SFTConfig()  # type: ignore[valid-type]
    data: DataSettings = DataSettings(max_prompt_length=8, prompt_tokens=(2, 8))
    gold: str = "configs.smollm2.sentiment:positive"
    frontier: Settings = Settings()
    reward: RewardSettings = RewardSettings()
    ppo: PPOSettings = PPOSettings(stop_at_eos=False)
    optimizer: Optimizers = Optimizers()
    run_dir: str = "runs/frontier"

    def __post_init__(self) -> None:
        iterations, points = self.ppo.total_iterations, self.frontier.num_points
        if iterations % points:
            raise InputError(
                f"frontier.num_points is {points}, but has to divide the {iterations} iterations "
                "of ppo.total_episodes and ppo.batch_size."
            )

    def without_runs(self) -> "Config":
        """The settings that all points of a run folder share."""
        none: dict[str, Any] = dict.fromkeys((*COEFFICIENTS, "seeds", "kl_limits"), ())
        return dataclasses.replace(
            self, frontier=dataclasses.replace(self.frontier, sft=True, **none)
        )
