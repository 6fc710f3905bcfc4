"""The section `ppo` of a configuration."""

import dataclasses
import math
from typing import Literal

from rlhf_jax.errors import InputError
from rlhf_jax.training.accumulate import check_steps


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `ppo` of a configuration; names are TRL's and trlX's.

    Attributes:
      total_episodes: responses sampled in the whole run; the last iteration is a full one.
      batch_size: responses sampled in one iteration.
      num_ppo_epochs: passes over each iteration's responses.
      num_mini_batches: optimizer steps in each pass; divides `batch_size`.
      gradient_accumulation_steps: parts that the rows of each optimizer step are run in, one after
        another, to save memory; the step is that of all of them.
      score_batch_size: responses that the passes between sampling and the updates, of policy,
        reference, values and reward models, score at a time, to save memory; divides `batch_size`.
        Null scores all at once.
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
      truncate_token: a token, as text or id, with which a response is over, for the reward, the
        update and the run's own evaluation alike; sampling itself runs on to EOS or the limit. In
        YAML and on the command line a number is an id.
      truncate_after: the token counts from this place on, the first being 0.
      missing_eos_penalty: taken off the score of a response that neither EOS nor `truncate_token`
        ended.
      missing_eos_score: the score of such a response, whatever it was given; not together with
        the penalty.
      subtract_reference_score: takes off the score that the same rewards give to the data set's
        `completion` of the prompt.
      cliprange_reward: scores are clipped to plus and minus this, before they are scaled.
      scale_reward: divides scores by the deviation of all scores until now, "running", or of those
        of the first iteration, "ref".
      exact_kl: adds the metric `objective/kl_exact`, the KL over the whole vocabulary; it holds the
        logits of policy and reference at once, 8 bytes for each token of a response and entry of
        the vocabulary.
      surrogate: "clip", or "kl_penalty": a penalty on the KL between old and new policy instead.
      penalty_coef: start value of that penalty's coefficient, which is doubled after an iteration
        that moved the policy by more than 1.5 `penalty_target`, and halved below a 1.5th of it.
      penalty_target: in nats per token.
      max_approxkl: an iteration ends before the first update whose minibatch has moved further
        than this, by `policy/approxkl_avg`; the learning rate's schedule counts updates taken.
      entropy_coef: weight of the entropy of the next token, in nats, that is to be raised.
      ptx_coef: weight of the cross entropy of texts in every update (PPO-ptx of InstructGPT), in
        nats per token; 0 reads no texts.
      ptx_batch_size: rows of texts in one iteration (a packed row holds several), split over its
        minibatches anew in each epoch; null takes `batch_size`.
      num_layers_unfrozen: so many upper layers are trained, with the final layer norm and the value
        head; 0 trains these two alone. The layers below and the embeddings are frozen, and policy
        and reference share them. Null trains all.
      value_model: "shared", a head on the policy's layers; "policy", a model of its own that starts
        as the policy, its head at zero; "reward", one that starts as the reward model, head
        included. With `num_layers_unfrozen` that of "policy" shares the frozen layers, while that
        of "reward" is trained whole.
    """

    total_episodes: int = 8192
    batch_size: int = 128
    num_ppo_epochs: int = 4
    num_mini_batches: int = 4
    gradient_accumulation_steps: int = 1
    score_batch_size: int | None = None
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
    truncate_token: int | str | None = None
    truncate_after: int = 0
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None
    subtract_reference_score: bool = False
    cliprange_reward: float | None = None
    scale_reward: Literal["running", "ref"] | None = None
    exact_kl: bool = False
    surrogate: Literal["clip", "kl_penalty"] = "clip"
    penalty_coef: float = 1.0
    penalty_target: float = 0.01
    max_approxkl: float | None = None
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    ptx_batch_size: int | None = None
    num_layers_unfrozen: int | None = None
    value_model: Literal["shared", "policy", "reward"] = "shared"

    def __post_init__(self) -> None:
        counts = ("total_episodes", "batch_size", "num_ppo_epochs", "num_mini_batches")
        above = ("target", "horizon", "temperature", "penalty_coef", "penalty_target")
        optional = ("cliprange_reward", "max_approxkl", "ptx_batch_size", "score_batch_size")
        for name in (*counts, "response_length", *above, *optional):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise InputError(f"ppo.{name} must be above 0, but is {getattr(self, name)}.")
        self._check_parts()
        shortest = self.min_response_length
        if shortest is not None and not 0 < shortest <= self.response_length:
            raise InputError(
                f"ppo.min_response_length must be from 1 to ppo.response_length = "
                f"{self.response_length}, but is {shortest}."
            )
        self._check_coefficients()
        self._check_ends()
        self._check_networks()

    def _check_parts(self) -> None:
        minibatches = self.num_mini_batches
        for name, rows in (("batch_size", self.batch_size), ("ptx_batch_size", self.num_texts)):
            if rows % minibatches:
                raise InputError(
                    f"ppo.{name} = {rows} is not divisible by ppo.num_mini_batches = "
                    f"{minibatches}; change one of them."
                )
            check_steps(
                "ppo",
                rows // minibatches,
                self.gradient_accumulation_steps,
                name=f"{name} / ppo.num_mini_batches",
            )
        if self.batch_size % (self.score_batch_size or 1):
            raise InputError(
                f"ppo.batch_size = {self.batch_size} is not divisible by ppo.score_batch_size = "
                f"{self.score_batch_size}; change one of them."
            )

    def _check_coefficients(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"ppo.{field.name} must be a finite number, but is {value}.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"ppo.{name} must be from 0 to 1, but is {getattr(self, name)}.")
        coefficients = ("kl_coef", "vf_coef", "entropy_coef", "ptx_coef")
        for name in (*coefficients, "cliprange", "cliprange_value"):
            if getattr(self, name) < 0:
                raise InputError(f"ppo.{name} must not be negative, but is {getattr(self, name)}.")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise InputError(
                f"ppo.kl_estimator must be k1, k2 or k3, but is {self.kl_estimator!r}."
            )
        if self.surrogate not in ("clip", "kl_penalty"):
            raise InputError(
                f"ppo.surrogate must be clip or kl_penalty, but is {self.surrogate!r}."
            )
        if self.scale_reward not in ("running", "ref", None):
            raise InputError(
                f"ppo.scale_reward must be running, ref or null, but is {self.scale_reward!r}."
            )

    def _check_ends(self) -> None:
        token, after = self.truncate_token, self.truncate_after
        if token == "" or (isinstance(token, int) and token < 0):
            raise InputError(f"ppo.truncate_token must be a text or an id, but is {token!r}.")
        if not 0 <= after < self.response_length or (after and token is None):
            raise InputError(
                "ppo.truncate_after must be from 0 to below ppo.response_length = "
                f"{self.response_length}, and 0 without ppo.truncate_token, but is {after}."
            )
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise InputError(
                "ppo.missing_eos_penalty and ppo.missing_eos_score exclude each other; set one."
            )

    def _check_networks(self) -> None:
        if self.num_layers_unfrozen is not None and self.num_layers_unfrozen < 0:
            raise InputError(
                "ppo.num_layers_unfrozen must not be negative, but is "
                f"{self.num_layers_unfrozen}; null trains all layers."
            )
        if self.value_model not in ("shared", "policy", "reward"):
            raise InputError(
                f"ppo.value_model must be shared, policy or reward, but is {self.value_model!r}."
            )

    @property
    def num_texts(self) -> int:
        """Rows of texts that an iteration of PPO-ptx reads."""
        return self.batch_size if self.ptx_batch_size is None else self.ptx_batch_size

    @property
    def num_score_parts(self) -> int:
        """Parts that an iteration's responses are scored in."""
        return self.batch_size // (self.score_batch_size or self.batch_size)

    @property
    def num_iterations(self) -> int:
        """Iterations that sample at least `total_episodes` responses."""
        return -(-self.total_episodes // self.batch_size)

    @property
    def num_updates(self) -> int:
        """Optimizer steps in the whole run."""
        return self.num_iterations * self.num_ppo_epochs * self.num_mini_batches
