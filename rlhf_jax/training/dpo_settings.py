"""The section `dpo` of a configuration, and the record of preference optimization on pairs."""

import dataclasses
from typing import Literal, get_args

from rlhf_jax.checks import FractionBelowOne, NonNegativeFloat, NonNegativeInt, PositiveFloat
from rlhf_jax.errors import InputError
from rlhf_jax.training.settings import OfflineSettings, OptimizerSettings
from rlhf_jax.training.trainer import Headline, Trainer

WithReference = Literal["sigmoid", "hinge", "ipo", "robust"]
WithoutReference = Literal["simpo", "cpo", "orpo"]


@dataclasses.dataclass(frozen=True)
class Settings(OfflineSettings):
    """The section `dpo` of a configuration; examples are pairs.

    Attributes:
      kind: of the loss, by TRL's name. Those of `functional.dpo_loss` compare with a reference, the
        model that the run begins with; "simpo", "cpo" and "orpo" have none.
      beta: strength of the KL constraint to the reference; for kinds without one the scale of the
        rewards.
      label_smoothing: the assumed share of pairs with swapped labels, for kinds that read it.
      gamma: target margin of the rewards, of "simpo" alone.
      precompute_ref: computes the log-probabilities of the reference once before the first step, and
        keeps them in `reference.npz` of the run; else in each step, with the parameters of the
        reference in memory.
      num_layers_unfrozen: the number of upper layers that are trained, with the final layer norm; 0
        trains this alone. The layers below and the embeddings are frozen, and policy and reference
        share them. Null trains all.
    """

    section = "dpo"  # of the configuration; without an annotation it is no field

    kind: Literal[WithReference, WithoutReference] = "sigmoid"
    beta: PositiveFloat = 0.1
    label_smoothing: FractionBelowOne = 0.0
    gamma: NonNegativeFloat = 1.0
    precompute_ref: bool = True
    num_layers_unfrozen: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.kind not in ("sigmoid", "robust"):
            raise InputError(
                f"dpo.label_smoothing is {self.label_smoothing}, but the kind {self.kind} has none;"
                " set it to 0."
            )

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.kind in get_args(WithReference)


TRAINER = Trainer(
    name="dpo",
    title="Preference optimization",
    label="DPO",
    summary="preference optimization on pairs: DPO, IPO, SimPO, ORPO and others",
    settings=Settings,
    reads=lambda settings: "pairs",
    optimizer=OptimizerSettings(learning_rate=1e-6),
    first_settings=("kind", "beta", "num_epochs", "batch_size", "num_layers_unfrozen"),
    headlines=(Headline("eval/accuracy", "accuracy"), Headline("eval/margin", "margin")),
    losses=("train/loss", "train/grad_norm"),
    has_reference=True,
)
