"""Rewards that can be verified, as functions for the section `rewards` of a configuration.

Each has the signature of TRL's reward functions, f(prompts, completions, **columns) -> a number for
each completion. Completions are texts, or messages, of which the last one counts. Other parameters
are `kwargs` of the source:

    rewards:
      - {function: "rlhf_jax.rewards:numeric_match"}
      - {function: "rlhf_jax.rewards:format_match", kwargs: {pattern: "<answer>.*</answer>"}}

Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from rlhf_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_jax.rewards.answers import exact_match as exact_match
    from rlhf_jax.rewards.answers import numeric_match as numeric_match
    from rlhf_jax.rewards.expressions import math_match as math_match
    from rlhf_jax.rewards.format import format_match as format_match
    from rlhf_jax.rewards.format import length_penalty as length_penalty
    from rlhf_jax.rewards.format import repetition_penalty as repetition_penalty

__getattr__, __dir__, __all__ = lazy_names(__name__)
