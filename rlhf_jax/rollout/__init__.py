"""From prompts to responses, and what is read off them."""

from rlhf_jax.rollout.generation import generate
from rlhf_jax.rollout.score import end_scores, frozen_states, response_hidden, token_scores

__all__ = ["end_scores", "generate", "frozen_states", "response_hidden", "token_scores"]
