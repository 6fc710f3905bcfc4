"""A GPT-2 of two layers in which everything matters."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
MODEL = GPT2(CONFIG)
VOCABULARY = CONFIG.vocab_size

hidden = jax.jit(MODEL.hidden)


def busy_params(model, seed=0, deviation=0.3, norm_scale=0.0):
    """Parameters in which everything matters: biases, scales and sharp attention included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * deviation, x.dtype), shapes
    )
    for norm in (params["ln_f"], params["layers"]["ln_1"], params["layers"]["ln_2"]):
        norm["scale"] += norm_scale
    table = params["wte"]["embedding"]
    params["wte"]["embedding"] = table.at[model.config.vocab_size :].set(0.0)
    return params


def pad(texts, width, side, junk):
    """(tokens, mask) of texts padded with token ids that mean nothing."""
    tokens, mask = np.full((len(texts), width), junk), np.zeros((len(texts), width), bool)
    for i, text in enumerate(texts):
        at = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        tokens[i, at], mask[i, at] = text, True
    return tokens, mask
