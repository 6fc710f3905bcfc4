"""A decoder on one text, in NumPy and double precision: no cache, no padding, layer by layer."""

import numpy as np


def logits_by_loop(config, params, tokens):
    """[L, V] of [L] tokens."""
    embedding = np.asarray(params["embed_tokens"]["embedding"], np.float64)
    x = embedding[tokens] * config.embedding_scale
    for i in range(config.num_hidden_layers):
        x = _layer(config, _at(params["layers"], i), i, x)
    logits = _norm(config, params["norm"], x) @ embedding[: config.vocab_size].T
    return _capped(logits, config.logit_softcap)


def _at(tree, i):
    if isinstance(tree, dict):
        return {name: _at(part, i) for name, part in tree.items()}
    return np.asarray(tree[i], np.float64)


def _layer(config, layer, i, x):
    both = config.norm_position == "both"
    h = _attention(config, layer["self_attn"], i, _norm(config, layer["input_layernorm"], x))
    x = x + (_norm(config, layer["post_attention_layernorm"], h) if both else h)
    before = "pre_feedforward_layernorm" if both else "post_attention_layernorm"
    h = _norm(config, layer[before], x)
    gate, up = (h @ layer["mlp"][name]["kernel"] for name in ("gate_proj", "up_proj"))
    if config.hidden_act == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    h = (gate * up) @ layer["mlp"]["down_proj"]["kernel"]
    return x + (_norm(config, layer["post_feedforward_layernorm"], h) if both else h)


def _attention(config, layer, i, x):
    length, width = len(x), config.head_dim
    is_sliding = bool(config.layer_types) and config.layer_types[i] == "sliding_attention"
    rope = config.sliding_rope if is_sliding and config.sliding_rope else config.rope
    has_rope = not config.no_rope_layers or config.no_rope_layers[i]
    q, k, v = (
        (x @ layer[name]["kernel"]).reshape(length, -1, width)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    if config.qk_norm == "head":
        q, k = _norm(config, layer["q_norm"], q), _norm(config, layer["k_norm"], k)
    if has_rope:
        q, k = _rotated(q, rope.rope_theta), _rotated(k, rope.rope_theta)
    groups = config.num_attention_heads // config.num_key_value_heads
    out = np.zeros(q.shape)
    for t in range(length):
        first = max(0, t - config.sliding_window + 1) if is_sliding else 0
        for head in range(config.num_attention_heads):
            keys, values = (part[first : t + 1, head // groups] for part in (k, v))
            logits = keys @ q[t, head] * (config.attention_scale or width**-0.5)
            weights = np.exp(_capped(logits, config.attention_softcap))
            out[t, head] = weights @ values / weights.sum()
    return out.reshape(length, -1) @ layer["o_proj"]["kernel"]


def _rotated(x, theta):
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    turn = np.exp(1j * angles)[:, None] * (x[..., :half] + 1j * x[..., half:])
    return np.concatenate([turn.real, turn.imag], axis=-1)


def _norm(config, layer, x):
    scale = np.asarray(layer["scale"], np.float64) + config.norm_offset
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * scale


def _capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)
