"""The section `online_dpo` of a configuration, and the record of DPO on sampled responses."""

import dataclasses
from typing import Annotated, Literal

from rlhf_jax.checks import Limit, PositiveFloat, PositiveInt
from rlhf_jax.errors import InputError
from rlhf_jax.training.dpo_settings import SMOOTHED
from rlhf_jax.training.settings import MinibatchSettings, OptimizerSettings, prompts_kind
from rlhf_jax.training.trainer import Headline, Trainer

# The kinds of `functional.dpo_loss` that read nothing but one number for each response.
OnlineKind = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
]


@dataclasses.dataclass(frozen=True)
class Settings(MinibatchSettings):
    """The section `online_dpo` of a configuration.

    Attributes:
      num_responses: responses sampled to each prompt. The one with the highest score is preferred
        to the one with the lowest; a prompt whose scores are all equal gives no pair.
      kind: of the loss: a kind of `functional.dpo_loss`, on sums over tokens.
      beta: strength of the KL constraint to the reference, the model that the run begins with.
      label_smoothing: the assumed share of pairs in the wrong order, for the kinds that read it.
      judge_fn: "module:function", a judge of two responses, which takes the place of rewards:
        f(prompts, responses_a, responses_b, **columns) -> for each prompt a number from 0 (a is
        better) to 1 (b is better), 0.5 being a tie. Each two of the responses to a prompt are
        judged in both orders, and the score of a response is its mean win rate.
      num_epochs: passes over each iteration's pairs.
    """

    section = "online_dpo"  # of the configuration; without an annotation it is no field

    num_responses: Annotated[int, Limit(lambda x: x >= 2, "be at least 2")] = 2
    kind: OnlineKind = "sigmoid"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Limit(lambda x: 0 <= x < 0.5, "be at least 0, below 0.5")] = (
        0.0
    )
    judge_fn: str | None = None
    num_epochs: PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.kind not in SMOOTHED:
            raise InputError(
                f"online_dpo.label_smoothing is {self.label_smoothing}, but {self.kind} has none; "
                "set it to 0."
            )
        if self.kind == "exo_pair" and not self.label_smoothing:
            raise InputError(
                "online_dpo.label_smoothing is 0, and the loss exo_pair is then infinite; its "
                "authors use 0.001."
            )

    @property
    def num_trained_responses(self) -> int:
        """The best and the worst response."""
        return 2


TRAINER = Trainer(
    name="online_dpo",
    title="Online preference optimization",
    label="Online DPO",
    summary="preference optimization on sampled responses, ranked by rewards or a judge",
    settings=Settings,
    reads=prompts_kind,
    online=True,
    # TRL's learning rate.
    optimizer=OptimizerSettings(learning_rate=5e-7),
    first_settings=("total_episodes", "batch_size", "response_length", "beta"),
    headlines=(
        Headline("objective/gold", "gold score"),
        Headline("objective/scores", "score"),
        Headline("eval/win_rate_judge", "win rate by the judge", shows_start=False),
        Headline("objective/kl", "KL", shows_start=False),
    ),
    losses=("train/loss", "train/grad_norm", "objective/scores"),
)
