"""Settings that trainers share: of the optimizer, of offline and of online methods.

Nothing here imports jax.
"""

import dataclasses
from typing import Literal

from rlhf_jax.checks import (
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_divides,
    check_fields,
)
from rlhf_jax.data.formats import Kind
from rlhf_jax.errors import InputError
from rlhf_jax.rollout.settings import ShapingSettings


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a warm-up, a decay and clipped gradients (Loshchilov and Hutter 2019).

    Attributes:
      learning_rate: after the warm-up.
      schedule: "constant", or a "linear" or "cosine" decay to 0 at the end of the run.
      warmup_steps: updates over which the learning rate rises linearly from 0, which the first one
        has, as in transformers and optax.
      weight_decay: of all parameters but those that a model excludes: biases and norms.
      b1, b2, eps: Adam's. openai/lm-human-preferences uses eps = 1e-5.
      max_grad_norm: gradients with a larger global norm are scaled down to it; null leaves them.
    """

    learning_rate: NonNegativeFloat = 5e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    b1: FractionBelowOne = 0.9
    b2: FractionBelowOne = 0.999
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0

    def __post_init__(self) -> None:
        check_fields("optimizer", self)


@dataclasses.dataclass(frozen=True)
class OfflineSettings:
    """Settings that training on a data set shares, whatever its loss.

    Attributes:
      batch_size: examples a step; several packed texts are one.
      gradient_accumulation_steps: microbatches that a batch is split into, one after another, to
        save memory; the step is that of the full batch, but each has its own dropout.
      num_epochs: passes over the data; may be a fraction.
      eval_batch_size: examples a step of the evaluation.
    """

    section = "offline"  # of the configuration; without an annotation it is no field

    batch_size: PositiveInt = 16
    gradient_accumulation_steps: PositiveInt = 1
    num_epochs: PositiveFloat = 1.0
    eval_batch_size: PositiveInt = 16

    def __post_init__(self) -> None:
        check_fields(self.section, self)
        check_divides(self, "batch_size", "gradient_accumulation_steps")


@dataclasses.dataclass(frozen=True)
class ReferenceSettings(OfflineSettings):
    """Settings of offline losses that may compare with a reference.

    Attributes:
      beta: strength of the KL constraint to the reference, by default the model that the run begins
        with.
      precompute_ref: computes the log-probabilities of the reference once before the first step,
        and keeps them in `reference.npz` of the run; else in each step, with the parameters of the
        reference in memory.
      num_layers_unfrozen: the number of upper layers that are trained, with the final layer norm; 0
        trains this alone. The layers below and the embeddings are frozen, and policy and reference
        share them. Null trains all.
    """

    beta: PositiveFloat = 0.1
    precompute_ref: bool = True
    num_layers_unfrozen: NonNegativeInt | None = None

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return True


@dataclasses.dataclass(frozen=True)
class SampledSettings(ShapingSettings):
    """Settings that training on sampled responses shares, whatever its loss.

    Attributes:
      total_episodes: responses sampled in the run; the last iteration is a full one.
      batch_size: prompts of one iteration.
      gradient_accumulation_steps: microbatches that the responses of each optimizer step are split
        into, one after another, to save memory; the step is that of all of them.
      score_batch_size: prompts with their responses that the passes between sampling and the
        updates, of policy, reference, value and reward models, score at a time, to save memory;
        divides `batch_size`. Null scores all at once.
      exact_kl: adds the metric `objective/kl_exact`, the KL over the full vocabulary; it holds the
        logits of policy and reference at once, 8 bytes for each token of a response and entry of
        the vocabulary.
      num_layers_unfrozen: the number of upper layers that are trained, with the final layer norm
        and the heads; 0 trains these alone. The layers below and the embeddings are frozen, and
        policy and reference share them. Null trains all.
    """

    section = "online"  # of the configuration; without an annotation it is no field

    total_episodes: PositiveInt = 8192
    batch_size: PositiveInt = 128
    gradient_accumulation_steps: PositiveInt = 1
    score_batch_size: PositiveInt | None = None
    exact_kl: bool = False
    num_layers_unfrozen: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides(self, "batch_size", "gradient_accumulation_steps")
        check_divides(self, "batch_size", "score_batch_size")
        if self.judge_fn is not None and self.subtract_reference_score:
            raise InputError(
                f"{self.section}.subtract_reference_score needs scores, which {self.section}."
                "judge_fn does not give; leave one of them out."
            )

    @property
    def num_responses(self) -> int | None:
        """K responses to each prompt; None for one, without an axis for it."""
        return None

    @property
    def num_trained_responses(self) -> int:
        """Responses to each prompt that the updates read."""
        return self.num_responses or 1

    @property
    def judge_fn(self) -> str | None:
        """A judge, "module:function", whose win rates take the place of scores."""
        return None

    @property
    def has_reference(self) -> bool:
        """Whether the state holds the reference."""
        return True

    @property
    def max_sampling_rounds(self) -> int:
        """Batches of prompts that an iteration draws at most."""
        return 1

    @property
    def kl_estimator(self) -> Literal["k1", "k2", "k3"]:
        """The estimate of the KL in the rewards."""
        return "k1"

    @property
    def num_score_parts(self) -> int:
        """Microbatches that the responses of an iteration are scored in."""
        return self.batch_size // (self.score_batch_size or self.batch_size)

    @property
    def total_iterations(self) -> int:
        """Iterations of the run, which sample at least `total_episodes` responses."""
        return -(-self.total_episodes // (self.batch_size * (self.num_responses or 1)))

    @property
    def minibatch_size(self) -> int:
        """Prompts of one optimizer step."""
        return self.batch_size

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps on the responses of one iteration."""
        return self.num_epochs * (self.batch_size // self.minibatch_size)

    @property
    def num_epochs(self) -> int:
        """Passes of the updates over the responses of one iteration."""
        return 1

    @property
    def num_forward_passes(self) -> int:
        """Forward passes of the trained layers in one iteration: sampling, policy, reference."""
        return 3

    @property
    def num_updates(self) -> int:
        """Optimizer steps in the run."""
        return self.total_iterations * self.updates_per_iteration


@dataclasses.dataclass(frozen=True)
class MinibatchSettings(SampledSettings):
    """Settings of training in several updates on the responses of one iteration.

    Attributes:
      num_mini_batches: optimizer steps in each pass over them; divides `batch_size`.
    """

    num_mini_batches: PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_minibatches("batch_size", self.batch_size)

    def _check_minibatches(self, name: str, size: int) -> None:
        """Raises an InputError unless the size splits into minibatches and microbatches."""
        check_divides(self, name, "num_mini_batches", size)
        part = f"{name} / {self.section}.num_mini_batches"
        per_update = size // self.num_mini_batches
        check_divides(self, part, "gradient_accumulation_steps", per_update)

    @property
    def minibatch_size(self) -> int:
        """Prompts of one optimizer step."""
        return self.batch_size // self.num_mini_batches


@dataclasses.dataclass(frozen=True)
class OnlineSettings(SampledSettings):
    """Settings of training on token rewards, which have a KL penalty towards the reference.

    Attributes:
      kl_coef: weight of the KL penalty in the rewards.
      kl_estimator: "k1", "k2" or "k3", of the penalty.
    """

    kl_coef: NonNegativeFloat = 0.05
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"


def prompts_kind(settings: SampledSettings) -> Kind:
    """The kind of examples: prompts, with reference completions where their score is subtracted."""
    return "references" if settings.subtract_reference_score else "prompts"
