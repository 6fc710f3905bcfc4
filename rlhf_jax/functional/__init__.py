"""The mathematics of RLHF: arrays in, arrays out; no model, no configuration, no tokenizer.

B batch, T response tokens, V vocabulary. A mask is True on real positions; entries elsewhere, NaN
included, change neither a value nor a gradient. `rlhf_jax` has the same functions compiled.
"""

from rlhf_jax.functional.advantages import gae, rewards_to_go, token_rewards
from rlhf_jax.functional.groups import (
    decoupled_advantages,
    group_advantages,
    leave_one_out_advantages,
    normalize_advantages,
    overlong_penalty,
    pass_at_k,
)
from rlhf_jax.functional.grpo import grpo_loss
from rlhf_jax.functional.kl import adaptive_kl_update, kl_estimate, penalty_kl_update, token_kl
from rlhf_jax.functional.linear import linear_token_logprobs
from rlhf_jax.functional.logprobs import token_entropy, token_logprobs
from rlhf_jax.functional.masking import masked_mean, masked_var, masked_whiten, response_mask
from rlhf_jax.functional.policy import (
    kl_penalty_policy_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reinforce_loss,
)
from rlhf_jax.functional.preference import dpo_loss, mixed_dpo_loss
from rlhf_jax.functional.reference_free import cpo_loss, orpo_loss, simpo_loss
from rlhf_jax.functional.responses import (
    length_desensitized_logprobs,
    token_collision_entropy,
    wpo_weights,
)
from rlhf_jax.functional.reward import pairwise_loss, ranking_loss, tokenwise_pairwise_loss
from rlhf_jax.functional.sft import cross_entropy_loss, linear_cross_entropy_loss
from rlhf_jax.functional.token_weights import (
    importance_weights,
    logprob_difference,
    top_entropy_mask,
)
from rlhf_jax.functional.unpaired import bco_loss, kto_loss

__all__ = [
    "adaptive_kl_update",
    "bco_loss",
    "cpo_loss",
    "cross_entropy_loss",
    "decoupled_advantages",
    "dpo_loss",
    "gae",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "kl_estimate",
    "kl_penalty_policy_loss",
    "kto_loss",
    "leave_one_out_advantages",
    "length_desensitized_logprobs",
    "linear_cross_entropy_loss",
    "linear_token_logprobs",
    "logprob_difference",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "mixed_dpo_loss",
    "normalize_advantages",
    "orpo_loss",
    "overlong_penalty",
    "pairwise_loss",
    "pass_at_k",
    "penalty_kl_update",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "reinforce_loss",
    "response_mask",
    "rewards_to_go",
    "simpo_loss",
    "token_collision_entropy",
    "token_entropy",
    "token_kl",
    "token_logprobs",
    "token_rewards",
    "tokenwise_pairwise_loss",
    "top_entropy_mask",
    "wpo_weights",
]
