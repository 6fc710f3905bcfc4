"""The section `ppo` of a configuration, and the record of PPO."""

import dataclasses
from typing import Literal

from rlhf_jax.checks import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from rlhf_jax.training.settings import (
    MinibatchSettings,
    OnlineSettings,
    OptimizerSettings,
    prompts_kind,
)
from rlhf_jax.training.trainer import Headline, Plot, Trainer


@dataclasses.dataclass(frozen=True)
class Settings(MinibatchSettings, OnlineSettings):
    """The section `ppo` of a configuration; names are TRL's and trlX's.

    `kl_coef` is the start value when `adaptive_kl` is set.

    Attributes:
      num_ppo_epochs: passes over each iteration's responses.
      adaptive_kl, target, horizon: the controller of Ziegler et al. 2019; target in nats per
        response, horizon in episodes.
      gamma, lam: of the advantage estimates.
      cliprange, cliprange_value, vf_coef: of the clipped losses.
      whiten_rewards: divides the token rewards by their standard deviation.
      surrogate: "clip", or "kl_penalty": a penalty on the KL between old and new policy instead.
      penalty_coef: start value of that penalty's coefficient, which is doubled after an iteration
        that moved the policy by more than 1.5 `penalty_target`, and halved below a 1.5th of it.
      penalty_target: in nats per token.
      max_approxkl: an iteration ends before the first update whose minibatch has moved further
        than this, by `policy/approxkl_avg`; the learning rate's schedule counts updates taken.
      entropy_coef: weight of the entropy of the next token, in nats, which is maximized.
      ptx_coef: weight of the cross entropy of texts in every update (PPO-ptx: Ouyang et al.,
        InstructGPT, equation 2), in nats per token; 0 reads no texts.
      ptx_batch_size: sequences of texts in one iteration (a packed one holds several), split over
        its minibatches anew in each epoch; null is `batch_size`.
      value_model: "shared", a head on the policy's layers; "policy", a model of its own that starts
        as the policy, its head at zero; "reward", one that starts as the reward model, head
        included. With `num_layers_unfrozen` that of "policy" shares the frozen layers, while all of
        that of "reward" is trained.
    """

    section = "ppo"  # of the configuration; without an annotation it is no field

    num_ppo_epochs: PositiveInt = 4
    num_mini_batches: PositiveInt = 4
    adaptive_kl: bool = False
    target: PositiveFloat = 6.0
    horizon: PositiveFloat = 10000.0
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange: NonNegativeFloat = 0.2
    cliprange_value: NonNegativeFloat = 0.2
    vf_coef: NonNegativeFloat = 0.1
    whiten_rewards: bool = False
    surrogate: Literal["clip", "kl_penalty"] = "clip"
    penalty_coef: PositiveFloat = 1.0
    penalty_target: PositiveFloat = 0.01
    max_approxkl: PositiveFloat | None = None
    entropy_coef: NonNegativeFloat = 0.0
    ptx_coef: NonNegativeFloat = 0.0
    ptx_batch_size: PositiveInt | None = None
    value_model: Literal["shared", "policy", "reward"] = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_minibatches("ptx_batch_size", self.num_texts)

    @property
    def num_texts(self) -> int:
        """Sequences of texts that an iteration of PPO-ptx reads."""
        return self.batch_size if self.ptx_batch_size is None else self.ptx_batch_size

    @property
    def num_epochs(self) -> int:
        """Passes of the updates over the responses of one iteration."""
        return self.num_ppo_epochs

    @property
    def num_forward_passes(self) -> int:
        """Forward passes of the trained layers: the penalised surrogate scores once more."""
        return 3 + (self.surrogate == "kl_penalty")


TRAINER = Trainer(
    name="ppo",
    title="PPO",
    label="PPO",
    summary="PPO against reward models, Python functions, or a sum of several",
    settings=Settings,
    reads=prompts_kind,
    online=True,
    # Adam's epsilon is that of openai/lm-human-preferences.
    optimizer=OptimizerSettings(learning_rate=1e-5, eps=1e-5),
    first_settings=("total_episodes", "batch_size", "response_length", "kl_coef"),
    headlines=(
        Headline("objective/gold", "gold score"),
        Headline("objective/scores", "score"),
        Headline("objective/kl", "KL", shows_start=False),
    ),
    losses=("loss/policy_avg", "loss/value_avg", "train/grad_norm"),
    diagnostics=(
        Plot("Policy loss", "", {"loss/policy_avg": "policy"}),
        Plot("Value loss", "", {"loss/value_avg": "value"}),
        Plot(
            "Clipped share",
            "of tokens",
            {"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "value"},
        ),
    ),
    has_value_model=True,
    mixes_texts=True,
)
