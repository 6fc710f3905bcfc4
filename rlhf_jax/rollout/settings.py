"""Settings of sampling and of scores; nothing here imports jax."""

import dataclasses
from typing import Literal

from rlhf_jax.checks import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    check_effect,
    check_fields,
)
from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """The section `generation`: how responses are sampled outside of training.

    Attributes:
      max_new_tokens: the longest response.
      min_new_tokens: EOS cannot come before this many tokens.
      temperature: 0 is greedy decoding.
      top_k, top_p: 0 and 1 keep the full distribution.
      batch_size: prompts at a time.
    """

    max_new_tokens: PositiveInt = 64
    min_new_tokens: NonNegativeInt = 0
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: PositiveFraction = 1.0
    batch_size: PositiveInt = 32

    def __post_init__(self) -> None:
        check_fields("generation", self)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled for training, and where they end.

    Attributes:
      response_length: the longest response, in tokens.
      min_response_length: if set, the limit of each response is drawn uniformly from it to
        `response_length`.
      stop_at_eos: ends responses at EOS; off, all run to their limit.
      temperature: of sampling; it divides the logits of policy and reference everywhere.
      truncate_token: a token, as text or id, that ends a response for the reward, the update and
        the run's own evaluation alike; sampling itself runs on to EOS or the limit. In YAML and on
        the command line a number is an id.
      truncate_after: the token counts from this position on, the first being 0.
    """

    section = "sampling"  # of the configuration; without an annotation it is no field

    response_length: PositiveInt = 32
    min_response_length: int | None = None
    stop_at_eos: bool = True
    temperature: PositiveFloat = 1.0
    truncate_token: int | str | None = None
    truncate_after: int = 0

    def __post_init__(self) -> None:
        section, longest = self.section, self.response_length
        check_fields(section, self)
        shortest = self.min_response_length
        if shortest is not None and not 0 < shortest <= longest:
            raise InputError(
                f"{section}.min_response_length must be from 1 to {section}.response_length = "
                f"{longest}, but is {shortest}."
            )
        token, after = self.truncate_token, self.truncate_after
        if token == "" or (isinstance(token, int) and token < 0):
            raise InputError(f"{section}.truncate_token must be a text or an id, but is {token!r}.")
        if not 0 <= after < longest or (after and token is None):
            raise InputError(
                f"{section}.truncate_after must be from 0 to below {section}.response_length = "
                f"{longest}, and 0 without {section}.truncate_token, but is {after}."
            )

    @property
    def top_k(self) -> int:
        """The number of likeliest tokens that are sampled from; 0 is all."""
        return 0

    @property
    def top_p(self) -> float:
        """The probability of the likeliest tokens that are sampled from; 1 is all."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class ShapingSettings(SamplingSettings):
    """How the score of a sampled response becomes the one that is trained on.

    Attributes:
      missing_eos_penalty: subtracted from the score of a response that neither EOS nor
        `truncate_token` ended.
      missing_eos_score: replaces the score of such a response; not together with the penalty.
      subtract_reference_score: subtracts the score that the same rewards give to the data set's
        `completion` of the prompt.
      cliprange_reward: scores are clipped to plus and minus this, before they are scaled.
      scale_reward: divides scores by the standard deviation of all scores until now, "running", or
        of those of the first iteration, "ref".
    """

    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None
    subtract_reference_score: bool = False
    cliprange_reward: PositiveFloat | None = None
    scale_reward: Literal["running", "ref"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            section = self.section
            raise InputError(
                f"{section}.missing_eos_penalty and {section}.missing_eos_score exclude each "
                "other; set one."
            )


@dataclasses.dataclass(frozen=True)
class TurnSettings(SamplingSettings):
    """Responses of several turns, which an environment replies to in between.

    Attributes:
      environment_fn: "module:function" of an environment: f(prompts, transcripts, **columns) ->
        for each transcript a text that is appended to it, after which the policy goes on, or None
        where it ends. Null is one turn, and the three settings below keep their defaults. The
        function is called when the policy has ended its turn; what it wrote is read by the policy
        and by rewards, and is not trained on.
      stop_strings: end a turn, as EOS does.
      turn_length: tokens of a turn at most; null is `response_length`, the limit of all turns with
        the replies.
      max_turns: of a response; the last one gets no reply.
    """

    environment_fn: str | None = None
    stop_strings: tuple[str, ...] = ()
    turn_length: PositiveInt | None = None
    max_turns: PositiveInt = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        section = self.section
        if self.environment_fn is None:
            of_turns = ("stop_strings", "turn_length", "max_turns")
            check_effect(self, of_turns, f"{section}.environment_fn")
            return
        if "" in self.stop_strings:
            raise InputError(f"{section}.stop_strings must not hold an empty text.")
        if self.turn_length is not None and self.turn_length > self.response_length:
            raise InputError(
                f"{section}.turn_length must be at most {section}.response_length = "
                f"{self.response_length}, but is {self.turn_length}."
            )
        others = {
            "truncate_token": self.truncate_token is not None,
            "min_response_length": self.min_response_length is not None,
            "stop_at_eos false": not self.stop_at_eos,
        }
        for name in (name for name, is_set in others.items() if is_set):
            raise InputError(
                f"{section}.{name} is not for turns, which EOS and {section}.stop_strings end; "
                f"leave it out, or {section}.environment_fn."
            )

    @property
    def longest_turn(self) -> int:
        """Tokens that the policy samples at a time."""
        return self.turn_length or self.response_length
