"""From prompts to responses, and their hidden states, log-probabilities and scores."""

from typing import TYPE_CHECKING

from rlhf_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_jax.rollout.generation import generate as generate
    from rlhf_jax.rollout.score import all_logprobs as all_logprobs
    from rlhf_jax.rollout.score import end_scores as end_scores
    from rlhf_jax.rollout.score import frozen_states as frozen_states
    from rlhf_jax.rollout.score import response_hidden as response_hidden
    from rlhf_jax.rollout.score import response_logits as response_logits
    from rlhf_jax.rollout.score import response_logprobs as response_logprobs
    from rlhf_jax.rollout.score import token_scores as token_scores

# `generate` stands in `generation.py`: a submodule of the same name would replace it as an
# attribute of the package once it is imported.
__getattr__, __dir__, __all__ = lazy_names(__name__)
