"""The section `dpo` of a configuration, and the record of preference optimization on pairs."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from rlhf_jax.checks import (
    Fraction,
    Limit,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
)
from rlhf_jax.errors import InputError
from rlhf_jax.preference_kinds import (
    BATCH_KINDS,
    DIVERGENCE_KINDS,
    DPO_KINDS,
    SMOOTHED_KINDS,
    Divergence,
    DPOKind,
)
from rlhf_jax.training.settings import OptimizerSettings, ReferenceSettings
from rlhf_jax.training.trainer import Headline, Trainer

ReferenceFree = Literal["simpo", "cpo", "orpo"]
SMOOTHED = SMOOTHED_KINDS | {"simpo", "cpo"}
READERS = {"gamma": ("simpo",), "nll_weight": ("cpo",), "discopop_tau": ("discopop",)}
FREE = get_args(ReferenceFree)


@dataclasses.dataclass(frozen=True)
class Settings(ReferenceSettings):
    """The section `dpo` of a configuration; examples are pairs.

    Attributes:
      kind: of the loss, by TRL's name. Those of `functional.dpo_loss` compare with a reference,
        by default the model that the run begins with; "simpo", "cpo" and "orpo" have none.
      kinds, loss_weights: kinds of `functional.dpo_loss` whose weighted sum is the loss, in place
        of `kind`, and their weights, by default 1: [sigmoid, sft] and [1.0, 0.5].
      beta: strength of the KL constraint to the reference; for kinds without one the scale of the
        rewards.
      label_smoothing: the assumed share of pairs with swapped labels, for the kinds that read it.
      gamma: target margin of the rewards, of "simpo" alone.
      nll_weight: weight of the likelihood loss, of "cpo" alone.
      discopop_tau: of "discopop".
      f_divergence_type, f_alpha_divergence_coef: the divergence from the reference, for kinds of a
        difference of two responses, and the parameter of "alpha_divergence".
      ld_alpha: weight of the tokens by which a response is longer than the other one; null: 1.
      use_weighting: weights pairs by the probability of their responses under the policy (WPO). It
        holds the logits of all response tokens at once.
      sync_ref_model: moves the reference towards the policy during training (TR-DPO), every
        `ref_model_sync_steps` steps to ref_model_mixup_alpha * policy + (1 - ref_model_mixup_alpha)
        * reference; needs `precompute_ref` to be false. Evaluations compare with the model that the
        run begins with.
      ref_model_mixup_alpha, ref_model_sync_steps: of `sync_ref_model`.
    """

    section = "dpo"  # of the configuration; without an annotation it is no field

    kind: Literal[DPOKind, ReferenceFree] = "sigmoid"
    kinds: tuple[DPOKind, ...] = ()
    loss_weights: tuple[float, ...] = ()
    label_smoothing: Annotated[float, Limit(lambda x: 0 <= x < 0.5, "be at least 0, below 0.5")] = (
        0.0
    )
    gamma: NonNegativeFloat = 1.0
    nll_weight: NonNegativeFloat = 1.0
    discopop_tau: PositiveFloat = 0.05
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: Fraction | None = None
    use_weighting: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: PositiveFraction = 0.6
    ref_model_sync_steps: PositiveInt = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = (_faults_of_mixtures, _unread, _faults_of_kinds, _faults_of_reference)
        for name, reason in itertools.chain.from_iterable(find(self) for find in faults):
            raise InputError(f"dpo.{name} is {getattr(self, name)}, {reason}.")

    @property
    def all_kinds(self) -> tuple[str, ...]:
        """The kinds whose sum is the loss."""
        return self.kinds or (self.kind,)

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.all_kinds[0] in DPO_KINDS

    @property
    def reference_terms(self) -> str:
        """The settings that log-probabilities of the reference depend on."""
        return f"ld_alpha={self.ld_alpha}"

    @property
    def reads_nll(self) -> bool:
        """Whether a likelihood loss of the chosen responses is part of the loss."""
        return any(kind in ("sft", "cpo", "orpo") for kind in self.all_kinds)


def _faults_of_mixtures(settings: Settings) -> Iterator[tuple[str, str]]:
    """(name, reason) of several kinds and their weights."""
    if unknown := [kind for kind in settings.kinds if kind not in DPO_KINDS]:
        yield "kinds", f"but {unknown[0]} is none of {', '.join(DPO_KINDS)}"
    if settings.kinds and settings.kind != "sigmoid":
        yield "kind", "but dpo.kinds is given, which takes its place; leave one of them out"
    weights = settings.loss_weights
    if weights and len(weights) != len(settings.kinds):
        number = len(settings.kinds)
        yield "loss_weights", f"but dpo.kinds names {number} losses; give one weight for each"
    if weights and not (all(weight >= 0 for weight in weights) and sum(weights) > 0):
        yield "loss_weights", "but weights are not negative, and not all 0"


def _unread(settings: Settings) -> Iterator[tuple[str, str]]:
    """(name, reason) of settings that were changed and have no effect."""
    kinds = " with ".join(settings.all_kinds)
    unread = {
        name: f"but {kinds} does not read it; leave it out"
        for name, readers in READERS.items()
        if not set(readers) & set(settings.all_kinds)
    }
    if settings.f_divergence_type != "alpha_divergence":
        unread["f_alpha_divergence_coef"] = "but dpo.f_divergence_type is not alpha_divergence"
    if not settings.sync_ref_model:
        reason = "but dpo.sync_ref_model is false, so that the reference does not move"
        unread |= dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), reason)
    for field in dataclasses.fields(settings):
        if field.name in unread and getattr(settings, field.name) != field.default:
            yield field.name, unread[field.name]


def _faults_of_kinds(settings: Settings) -> Iterator[tuple[str, str]]:
    """(name, reason) of settings that the kinds do not support."""
    kinds, smoothing = settings.all_kinds, settings.label_smoothing
    names = " with ".join(kinds)
    if smoothing and not any(kind in SMOOTHED for kind in kinds):
        yield "label_smoothing", f"but {names} has none; set it to 0"
    if "exo_pair" in kinds and not smoothing:
        yield "label_smoothing", "and the loss exo_pair is then infinite; its authors use 0.001"
    if settings.gradient_accumulation_steps > 1 and BATCH_KINDS.intersection(kinds):
        reason = f"but {names} sorts the batch, which its parts cannot; set it to 1"
        yield "gradient_accumulation_steps", reason
    weighted = [kind for kind in kinds if kind != "sft"]
    is_unfit = not weighted or any(kind in (*BATCH_KINDS, *FREE) for kind in weighted)
    if settings.use_weighting and is_unfit:
        yield "use_weighting", f"but {names} has no loss of single pairs to weight; set it to false"


def _faults_of_reference(settings: Settings) -> Iterator[tuple[str, str]]:
    """(name, reason) of settings that do not fit the reference."""
    names = " with ".join(settings.all_kinds)
    is_of_difference = all(kind in DIVERGENCE_KINDS for kind in settings.all_kinds)
    if settings.f_divergence_type != "reverse_kl" and not is_of_difference:
        allowed = ", ".join(DIVERGENCE_KINDS)
        yield "f_divergence_type", f"but {names} needs reverse_kl; others go with {allowed}"
    if settings.ld_alpha is not None and not settings.has_reference:
        yield "ld_alpha", f"but {names} has no reference and reads all tokens; leave it out"
    if not settings.precompute_ref and not settings.has_reference:
        yield "precompute_ref", f"but {names} has no reference; leave it out"
    if settings.sync_ref_model and not settings.has_reference:
        yield "sync_ref_model", f"but {names} has no reference; set it to false"
    if settings.sync_ref_model and settings.precompute_ref:
        reason = "but a reference that moves cannot be computed once before the first step"
        yield "sync_ref_model", f"{reason}; set dpo.precompute_ref to false"


TRAINER = Trainer(
    name="dpo",
    title="Preference optimization",
    label="DPO",
    summary="preference optimization on pairs: DPO, IPO, SimPO, ORPO and others",
    settings=Settings,
    reads=lambda settings: "pairs",
    optimizer=OptimizerSettings(learning_rate=1e-6),
    first_settings=("kind", "beta", "num_epochs", "batch_size"),
    headlines=(
        Headline("eval/accuracy", "accuracy"),
        Headline("eval/longer_wins", "longer wins", shows_start=False),
        Headline("eval/margin", "margin"),
    ),
    losses=("train/loss", "train/grad_norm"),
    has_reference=True,
)
