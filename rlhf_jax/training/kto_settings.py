"""The section `kto` of a configuration, and the record of optimization on unpaired responses."""

import dataclasses
from typing import Literal

from rlhf_jax.checks import NonNegativeFloat
from rlhf_jax.errors import InputError
from rlhf_jax.training.settings import OptimizerSettings, ReferenceSettings
from rlhf_jax.training.trainer import Headline, Trainer


@dataclasses.dataclass(frozen=True)
class Settings(ReferenceSettings):
    """The section `kto` of a configuration; examples are responses with a label.

    Attributes:
      kind: of the loss. "kto" measures from an estimate of the KL divergence, a mean over the
        batch; "apo_zero_unpaired" from 0.
      desirable_weight, undesirable_weight: of the two groups. Their ratio should be that of the
        numbers of undesirable and desirable examples, up to a factor of 4/3 (Ethayarajh et al.,
        equation 9).
    """

    section = "kto"  # of the configuration; without an annotation it is no field

    kind: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: NonNegativeFloat = 1.0
    undesirable_weight: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "kto" and self.gradient_accumulation_steps > 1:
            raise InputError(
                f"kto.gradient_accumulation_steps is {self.gradient_accumulation_steps}, but the "
                "loss kto reads a mean over the batch, which its parts do not have; set it to 1, "
                "or kto.kind to apo_zero_unpaired."
            )
        if not self.desirable_weight + self.undesirable_weight:
            raise InputError(
                "kto.desirable_weight and kto.undesirable_weight are both 0: set one above it."
            )

    @property
    def reference_terms(self) -> str:
        """The settings that log-probabilities of the reference depend on."""
        return f"kind={self.kind}"


TRAINER = Trainer(
    name="kto",
    title="Optimization on unpaired preferences",
    label="KTO",
    summary="optimization on single responses that are desirable or not: KTO, APO-zero",
    settings=Settings,
    reads=lambda settings: "unpaired",
    optimizer=OptimizerSettings(learning_rate=1e-6),
    first_settings=("kind", "beta", "num_epochs", "batch_size"),
    headlines=(Headline("eval/accuracy", "accuracy"), Headline("eval/loss", "loss")),
    losses=("train/loss", "train/grad_norm"),
    has_reference=True,
)
