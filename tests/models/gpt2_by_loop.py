"""GPT-2 in NumPy, float64, one text at a time and one head at a time: the reference of the tests.

Written from the equations of Radford et al. 2019 and Hendrycks and Gimpel 2016 (GELU); it shares no
line with the package.
"""

import math

import numpy as np

ACTIVATIONS = {
    "gelu_new": lambda x: (
        0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu": lambda x: 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0))),
    "relu": lambda x: np.where(x > 0, x, 0.0),
}


def as_float64(tree):
    """The same nested dict with float64 NumPy arrays."""
    if isinstance(tree, dict):
        return {name: as_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, np.float64)


def hidden_by_loop(params, config, tokens, keys=None):
    """[L, D] after the final layer norm, of one text without padding.

    Where `keys` is given, only so many positions are seen, by those behind them too.
    """
    params = as_float64(params)
    layers = params["layers"]
    x = np.stack(
        [
            params["wte"]["embedding"][token] + params["wpe"]["embedding"][position]
            for position, token in enumerate(tokens)
        ]
    )
    for n in range(config.n_layer):
        h = _norm(x, layers["ln_1"]["scale"][n], layers["ln_1"]["bias"][n], config)
        x = x + _attention(h, layers["attn"], n, config, keys or len(tokens))
        h = _norm(x, layers["ln_2"]["scale"][n], layers["ln_2"]["bias"][n], config)
        h = ACTIVATIONS[config.activation_function](_linear(h, layers["mlp"]["c_fc"], n))
        x = x + _linear(h, layers["mlp"]["c_proj"], n)
    return _norm(x, params["ln_f"]["scale"], params["ln_f"]["bias"], config)


def logits_by_loop(params, config, tokens, keys=None):
    """[L, V] of one text."""
    table = np.asarray(params["wte"]["embedding"], np.float64)[: config.vocab_size]
    return hidden_by_loop(params, config, tokens, keys) @ table.T


def log_softmax(logits):
    """Log-probabilities along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _attention(x, params, n, config, keys):
    kernel, bias = params["c_attn"]["kernel"][n], params["c_attn"]["bias"][n]
    q, k, v = (x @ kernel[:, i] + bias[i] for i in range(3))
    width = config.n_embd // config.n_head
    out = np.zeros_like(x)
    for head in range(config.n_head):
        part = slice(head * width, (head + 1) * width)
        for t in range(len(x)):
            seen = range(min(t + 1, keys))
            weights = np.exp(
                log_softmax(np.array([q[t, part] @ k[s, part] / math.sqrt(width) for s in seen]))
            )
            out[t, part] = sum(weights[s] * v[s, part] for s in seen)
    return _linear(out, params["c_proj"], n)


def _linear(x, params, n):
    return x @ params["kernel"][n] + params["bias"][n]


def _norm(x, scale, bias, config):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + config.layer_norm_epsilon) * scale + bias
