"""Linear heads that turn a hidden state into one number: a value, or a reward."""

import jax
import jax.numpy as jnp

Head = dict[str, jax.Array]


def init_value_head(width: int) -> Head:
    """A value head that starts at zero: {"kernel": f32[D], "bias": f32[]}.

    A zero start keeps the first advantages those of the rewards alone (Huang et al. 2024, The N
    Implementation Details of RLHF with PPO).
    """
    return {"kernel": jnp.zeros((width,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def init_reward_head(key: jax.Array, width: int) -> Head:
    """A reward head from N(0, 1 / (D + 1)), without a bias: {"kernel": f32[D]}.

    The scale is that of Ziegler et al. 2019 (openai/lm-human-preferences); a bias cancels in every
    difference of scores, and Hugging Face's sequence classification has none.
    """
    scale = (width + 1) ** -0.5
    return {"kernel": scale * jax.random.normal(key, (width,), jnp.float32)}


def apply_head(head: Head, hidden: jax.Array) -> jax.Array:
    """kernel . hidden (+ bias, where the head has one), f32[...] of hidden states [..., D]."""
    values = jnp.einsum(
        "...d,d->...",
        hidden.astype(jnp.float32),
        head["kernel"],
        precision=jax.lax.Precision.HIGHEST,
    )
    return values + head["bias"] if "bias" in head else values
