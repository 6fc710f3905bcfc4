"""From prompts to responses, and their hidden states, log-probabilities and scores."""

from rlhf_jax.rollout.generate import generate
from rlhf_jax.rollout.score import (
    end_scores,
    frozen_states,
    response_hidden,
    response_logits,
    response_logprobs,
    token_scores,
)

__all__ = [
    "end_scores",
    "generate",
    "frozen_states",
    "response_hidden",
    "response_logits",
    "response_logprobs",
    "token_scores",
]
