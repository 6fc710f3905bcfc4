"""The section `rft` of a configuration, and the record of rejection sampling."""

import dataclasses

from rlhf_jax.checks import PositiveInt
from rlhf_jax.training.settings import OptimizerSettings
from rlhf_jax.training.sft_settings import TextSettings
from rlhf_jax.training.trainer import Headline, Trainer


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
    """The section `rft` of a configuration.

    Attributes:
      num_samples: responses that are sampled for each prompt.
      threshold: responses with a lower score are left out; null leaves out none.
      max_per_prompt: the number of responses of a prompt that are trained on, those with the
        highest scores; null takes all.
      keep_truncated: also takes responses that reached `generation.max_new_tokens` without EOS; as
        EOS is appended to a completion, the model learns to end there.
    """

    section = "rft"  # of the configuration; without an annotation it is no field

    num_samples: PositiveInt = 4
    threshold: float | None = None
    max_per_prompt: PositiveInt | None = 1
    keep_truncated: bool = False


TRAINER = Trainer(
    name="rft",
    title="Rejection sampling",
    label="RFT",
    summary="rejection sampling: fine-tuning on the best of the model's own responses",
    settings=Settings,
    reads=lambda settings: "text",
    samples_first=True,
    has_dropout=True,
    optimizer=OptimizerSettings(learning_rate=1e-5),
    first_settings=("num_samples", "max_per_prompt", "num_epochs", "batch_size"),
    headlines=(
        Headline("eval/scores", "score"),
        Headline("eval/win_rate_scores", "win rate by the score"),
    ),
    losses=("train/loss", "train/grad_norm"),
    module="rlhf_jax.training.sft",
)
