"""The section `sft` of a configuration, and the record of supervised fine-tuning."""

import dataclasses

from rlhf_jax.checks import FractionBelowOne, NonNegativeFloat, NonNegativeInt
from rlhf_jax.training.settings import OfflineSettings, OptimizerSettings
from rlhf_jax.training.trainer import Headline, Trainer


@dataclasses.dataclass(frozen=True)
class TextSettings(OfflineSettings):
    """Settings of training on the tokens of texts, wherever these come from.

    Attributes:
      dropout: trains with the dropout rates of the model's configuration.
      label_smoothing, z_loss: of `functional.cross_entropy_loss`.
    """

    dropout: bool = True
    label_smoothing: FractionBelowOne = 0.0
    z_loss: NonNegativeFloat = 0.0


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
    """The section `sft` of a configuration.

    Attributes:
      rouge_rows: held-out examples, the first ones, whose ROUGE each evaluation computes: of the
        likeliest next tokens, each after the true ones, against the completion.
    """

    section = "sft"  # of the configuration; without an annotation it is no field

    rouge_rows: NonNegativeInt = 0


TRAINER = Trainer(
    name="sft",
    title="Supervised fine-tuning",
    label="SFT",
    summary="supervised fine-tuning on texts, or on completions of prompts",
    settings=Settings,
    reads=lambda settings: "text",
    headlines=(Headline("eval/loss", "loss"), Headline("eval/perplexity", "perplexity")),
    optimizer=OptimizerSettings(learning_rate=5e-4),
    first_settings=("num_epochs", "batch_size", "gradient_accumulation_steps", "dropout"),
    has_dropout=True,
    has_rouge=True,
    losses=("train/loss", "train/grad_norm"),
)
