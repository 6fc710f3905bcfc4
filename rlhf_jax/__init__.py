"""RLHF in JAX: the functions of `rlhf_jax.functional`, compiled, under the same names.

Signatures and docstrings are the plain functions' own. Strings, sizes, axes, flags and stop tokens
are static: a new one compiles anew, while coefficients are traced.
"""

import jax

from rlhf_jax import functional

__version__ = "0.1.0"

adaptive_kl_update = jax.jit(functional.adaptive_kl_update)
cross_entropy_loss = jax.jit(functional.cross_entropy_loss)
dpo_loss = jax.jit(functional.dpo_loss, static_argnames="kind")
gae = jax.jit(functional.gae)
group_advantages = jax.jit(functional.group_advantages, static_argnames="scale")
grpo_loss = jax.jit(functional.grpo_loss, static_argnames="reduction")
kl_estimate = jax.jit(functional.kl_estimate, static_argnames="kind")
kl_penalty_policy_loss = jax.jit(functional.kl_penalty_policy_loss)
kto_loss = jax.jit(functional.kto_loss)
leave_one_out_advantages = jax.jit(functional.leave_one_out_advantages)
linear_token_logprobs = jax.jit(
    functional.linear_token_logprobs, static_argnames=("chunk_size", "vocab_size")
)
masked_mean = jax.jit(functional.masked_mean, static_argnames="axis")
masked_var = jax.jit(functional.masked_var, static_argnames=("axis", "unbiased"))
masked_whiten = jax.jit(functional.masked_whiten, static_argnames=("shift_mean", "unbiased"))
orpo_loss = jax.jit(functional.orpo_loss)
pairwise_loss = jax.jit(functional.pairwise_loss)
penalty_kl_update = jax.jit(functional.penalty_kl_update)
ppo_policy_loss = jax.jit(functional.ppo_policy_loss)
ppo_value_loss = jax.jit(functional.ppo_value_loss)
ranking_loss = jax.jit(functional.ranking_loss)
reinforce_loss = jax.jit(functional.reinforce_loss)
response_mask = jax.jit(functional.response_mask, static_argnames="stop_token_ids")
rewards_to_go = jax.jit(functional.rewards_to_go)
simpo_loss = jax.jit(functional.simpo_loss)
token_entropy = jax.jit(functional.token_entropy)
token_kl = jax.jit(functional.token_kl)
token_logprobs = jax.jit(functional.token_logprobs)
token_rewards = jax.jit(functional.token_rewards, static_argnames="kl_kind")
tokenwise_pairwise_loss = jax.jit(functional.tokenwise_pairwise_loss, static_argnames="past_end")

__all__ = ["__version__", "functional", *functional.__all__]
