"""The section `reward` of a configuration, and the record of the reward model's training."""

import dataclasses
from typing import Annotated, Literal

from rlhf_jax.checks import Limit, NonNegativeFloat, NonNegativeInt, PositiveInt
from rlhf_jax.data.formats import Kind
from rlhf_jax.errors import InputError
from rlhf_jax.training.settings import OfflineSettings
from rlhf_jax.training.trainer import Headline, Trainer

Objective = Literal["last_token", "tokenwise", "ranking"]


@dataclasses.dataclass(frozen=True)
class Settings(OfflineSettings):
    """The section `reward` of a configuration; examples are pairs, or rankings.

    Attributes:
      objective: which scores are compared. "last_token": those at the last tokens of a pair.
        "tokenwise": those at every token from the first in which the pair differs. "ranking": the
        last scores of all responses to a prompt, each two of them, a prompt counting once. The
        evaluation compares pairs by their last scores whatever the objective.
      center_coef: weight of the squared sum of both scores, which keeps them near 0; of
        "last_token" alone.
      normalize_before: scales and shifts the reward model before its training, until its scores of
        preferred responses have mean 0 and variance 1.
      normalize_after: likewise after its training: the model in `hf/` and `evaluation.json`.
        Metrics and samples of training are of the model before that.
      normalize_rows: the number of training examples whose preferred responses are scored for it,
        at most all.
      num_layers_unfrozen: the number of upper layers that are trained, with the final layer norm
        and the head; 0 trains these two alone. The layers below and the embeddings are frozen. Null
        trains all.
    """

    section = "reward"  # of the configuration; without an annotation it is no field

    objective: Objective = "last_token"
    batch_size: PositiveInt = 32
    eval_batch_size: PositiveInt = 32
    center_coef: NonNegativeFloat = 0.0
    normalize_before: bool = False
    normalize_after: bool = False
    normalize_rows: Annotated[int, Limit(lambda x: x >= 2, "be at least 2")] = 256
    num_layers_unfrozen: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center_coef > 0 and self.objective != "last_token":
            raise InputError(
                f"reward.center_coef is {self.center_coef}, but only the objective last_token has "
                f"that term; set it to 0 for {self.objective}."
            )


def _examples_kind(settings: Settings) -> Kind:
    """The kind of examples of an objective: pairs, or rankings."""
    return "rankings" if settings.objective == "ranking" else "pairs"


TRAINER = Trainer(
    name="reward",
    title="Reward model",
    label="Reward",
    summary="a reward model from compared responses",
    settings=Settings,
    reads=_examples_kind,
    trains="reward_model",
    headlines=(Headline("eval/accuracy", "accuracy"),),
    first_settings=("objective", "num_epochs", "batch_size", "num_layers_unfrozen"),
    losses=("train/loss", "train/grad_norm"),
)
