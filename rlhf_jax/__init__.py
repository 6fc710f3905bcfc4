"""RLHF in JAX: the functions of `rlhf_jax.functional`, compiled, under the same names.

Signatures and docstrings are those of the plain functions. Strings, sizes, axes, flags and stop
tokens are static: a new value compiles anew, while coefficients are traced. Functions are compiled,
and jax is imported, when a name is first used: `import rlhf_jax` alone imports neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax import functional
    from rlhf_jax.functional import *  # noqa: F403

__version__ = "0.1.0"

_STATIC_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "adaptive_kl_update": (),
    "bco_loss": (),
    "cpo_loss": ("kind",),
    "cross_entropy_loss": (),
    "decoupled_advantages": (),
    "dpo_loss": ("kind", "divergence"),
    "gae": (),
    "group_advantages": ("scale",),
    "grpo_loss": ("kind", "level", "reduction", "kl_kind", "kl_bias_correction"),
    "importance_weights": ("level", "mode"),
    "kl_estimate": ("kind",),
    "kl_penalty_policy_loss": (),
    "kto_loss": ("kind",),
    "leave_one_out_advantages": (),
    "length_desensitized_logprobs": (),
    "linear_cross_entropy_loss": ("chunk_size", "vocab_size"),
    "linear_token_logprobs": ("chunk_size", "vocab_size"),
    "logprob_difference": (),
    "masked_mean": ("axis",),
    "masked_var": ("axis", "unbiased"),
    "masked_whiten": ("shift_mean", "unbiased"),
    "mixed_dpo_loss": ("kinds", "divergence"),
    "normalize_advantages": (),
    "orpo_loss": (),
    "overlong_penalty": (),
    "pairwise_loss": (),
    "pass_at_k": ("samples", "k"),
    "penalty_kl_update": (),
    "ppo_policy_loss": (),
    "ppo_value_loss": (),
    "ranking_loss": (),
    "reinforce_loss": (),
    "response_mask": ("stop_token_ids",),
    "rewards_to_go": (),
    "simpo_loss": (),
    "token_collision_entropy": (),
    "token_entropy": (),
    "token_kl": (),
    "token_logprobs": (),
    "token_rewards": ("kl_kind",),
    "tokenwise_pairwise_loss": ("past_end",),
    "top_entropy_mask": (),
    "wpo_weights": (),
}

__all__ = ["__version__", "functional", *_STATIC_ARGUMENTS]


def __getattr__(name: str) -> Any:
    """Imports `functional`, or compiles one of its functions once (PEP 562)."""
    if name == "functional":
        return importlib.import_module("rlhf_jax.functional")
    if name not in _STATIC_ARGUMENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import jax

    from rlhf_jax import functional

    compiled = jax.jit(getattr(functional, name), static_argnames=_STATIC_ARGUMENTS[name])
    globals()[name] = compiled
    return compiled


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
