"""A small GPT-2 with random parameters, its folders, and edits of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models.gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(
    vocab_size=11,
    n_positions=8,
    n_embd=8,
    n_layer=2,
    n_head=2,
    n_inner=12,
    resid_pdrop=0.0,
    layer_norm_epsilon=1e-4,
    bos_token_id=0,
    eos_token_id=1,
)
TOKENS = np.array([[3, 4, 5, 1], [7, 1, 0, 0]], np.int32)
MASK = np.array([[True, True, True, True], [True, True, False, False]])


def random_params(model, seed=0):
    """Every leaf random, so that two that are swapped show; the padding of the vocabulary zero."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    wte = params["wte"]["embedding"]
    params["wte"]["embedding"] = wte.at[model.config.vocab_size :].set(0.0)
    return params


MODEL = GPT2(CONFIG)
PARAMS = random_params(MODEL)
HEAD = {"kernel": jnp.arange(1.0, 9.0)}


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({k: np.ascontiguousarray(v) for k, v in change(tensors).items()}, path)


def assert_equal(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def assert_one_sentence(error):
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def adding(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


def word_tokenizer(size, **special):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {"<|bos|>": 0, "<|endoftext|>": 1} | {f"w{i}": i for i in range(2, size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", padding_side="left", **special
    )
