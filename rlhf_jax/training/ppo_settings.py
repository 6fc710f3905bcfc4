"""The section `ppo` of a configuration."""

import dataclasses
from typing import Literal

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `ppo` of a configuration; names are TRL's and trlX's.

    Attributes:
      total_episodes: responses sampled in the whole run; the last iteration is a full one.
      batch_size: responses sampled in one iteration.
      num_ppo_epochs: passes over each iteration's responses.
      num_mini_batches: optimizer steps in each pass; divides `batch_size`.
      response_length: the longest response, in tokens.
      min_response_length: where given, each response's limit is drawn uniformly from it to
        `response_length`.
      stop_at_eos: ends responses at EOS; off, all run to their limit.
      temperature: of sampling; it divides the logits of policy and reference everywhere.
      kl_coef: weight of the KL penalty; the start value when `adaptive_kl`.
      kl_estimator: "k1", "k2" or "k3", of the penalty.
      adaptive_kl, target, horizon: the controller of Ziegler et al. 2019; target in nats per
        response, horizon in episodes.
      gamma, lam: of the advantage estimates.
      cliprange, cliprange_value, vf_coef: of the clipped losses.
      whiten_rewards: divides the token rewards by their deviation.
      missing_eos_penalty: taken off the score of a response without EOS.
      cliprange_reward: scores are clipped to plus and minus this.
    """

    total_episodes: int = 8192
    batch_size: int = 128
    num_ppo_epochs: int = 4
    num_mini_batches: int = 4
    response_length: int = 32
    min_response_length: int | None = None
    stop_at_eos: bool = True
    temperature: float = 1.0
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    adaptive_kl: bool = False
    target: float = 6.0
    horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    cliprange_reward: float | None = None

    def __post_init__(self) -> None:
        counts = ("total_episodes", "batch_size", "num_ppo_epochs", "num_mini_batches")
        for name in (*counts, "response_length", "target", "horizon", "temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"ppo.{name} must be above 0, but is {getattr(self, name)}.")
        if self.batch_size % self.num_mini_batches:
            raise InputError(
                f"ppo.batch_size = {self.batch_size} is not divisible by ppo.num_mini_batches = "
                f"{self.num_mini_batches}; change one of them."
            )
        shortest = self.min_response_length
        if shortest is not None and not 0 < shortest <= self.response_length:
            raise InputError(
                f"ppo.min_response_length must be from 1 to ppo.response_length = "
                f"{self.response_length}, but is {shortest}."
            )
        self._check_coefficients()

    def _check_coefficients(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"ppo.{name} must be from 0 to 1, but is {getattr(self, name)}.")
        for name in ("kl_coef", "cliprange", "cliprange_value", "vf_coef"):
            if getattr(self, name) < 0:
                raise InputError(f"ppo.{name} must not be negative, but is {getattr(self, name)}.")
        if self.cliprange_reward is not None and self.cliprange_reward <= 0:
            raise InputError(
                f"ppo.cliprange_reward must be above 0, but is {self.cliprange_reward}."
            )
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise InputError(
                f"ppo.kl_estimator must be k1, k2 or k3, but is {self.kl_estimator!r}."
            )

    @property
    def num_iterations(self) -> int:
        """Iterations that sample at least `total_episodes` responses."""
        return -(-self.total_episodes // self.batch_size)

    @property
    def num_updates(self) -> int:
        """Optimizer steps in the whole run."""
        return self.num_iterations * self.num_ppo_epochs * self.num_mini_batches
