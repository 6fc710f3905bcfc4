"""GPT-2's configuration, where its parameters start, and how they are split into halves."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models.embedding import padded_vocab_size
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.models.interface import positions_from
from tests.models.tiny_gpt2 import CONFIG, MODEL, busy_params, pad


def test_init_has_the_published_scales():
    config = GPT2Config(vocab_size=300, n_positions=128, n_embd=64, n_layer=4, n_head=2)
    params = jax.jit(GPT2(config).init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    layers = params["layers"]
    small = 0.02 / 8**0.5
    for kernel, scale in (
        (params["wte"]["embedding"][:300], 0.02),
        (params["wpe"]["embedding"], 0.02),
        (layers["attn"]["c_attn"]["kernel"], 0.02),
        (layers["attn"]["c_proj"]["kernel"], small),
        (layers["mlp"]["c_fc"]["kernel"], 0.02),
        (layers["mlp"]["c_proj"]["kernel"], small),
    ):
        assert float(jnp.std(kernel)) == pytest.approx(scale, rel=0.05)
    assert params["wte"]["embedding"].shape == (384, 64)
    np.testing.assert_array_equal(params["wte"]["embedding"][300:], 0.0)
    kernels = np.asarray(layers["attn"]["c_attn"]["kernel"])
    for a, b in itertools.combinations(range(4), 2):
        assert np.abs(kernels[a] - kernels[b]).max() > 0.01
    for leaf in jax.tree.leaves(
        [params["ln_f"]["bias"], *(layers[name]["bias"] for name in ("ln_1", "ln_2"))]
    ):
        np.testing.assert_array_equal(leaf, 0.0)
    np.testing.assert_array_equal(layers["ln_1"]["scale"], np.ones((4, 64)))


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)]
)
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert padded_vocab_size(vocab_size) == padded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, "n_layer must be above 0, but is 0"),
        ({"vocab_size": -1}, "vocab_size must be above 0, but is -1"),
        ({"n_embd": 10, "n_head": 4}, "n_embd must be a multiple of n_head, but 10"),
        ({"activation_function": "swish"}, "or relu, but is 'swish'"),
    ],
    ids=str,
)
def test_a_wrong_configuration_names_the_allowed_values(change, message):
    with pytest.raises(InputError, match=message):
        GPT2Config(**change)


def test_gpt2_small_multiplies_each_token_with_its_matrices():
    model = GPT2(GPT2Config())
    params = jax.eval_shape(model.init, jax.random.key(0))
    layers = 12 * (768 * 3 * 768 + 768 * 768 + 2 * 4 * 768 * 768)
    assert model.flops_per_token(params, unembeds=True) == 2 * (layers + 50304 * 768)
    scorer = {"model": params, "head": {"kernel": jnp.zeros(768)}}
    assert model.flops_per_token(scorer, unembeds=False) == 2 * (layers + 768)
    _, trained = jax.eval_shape(lambda params: model.split(params, 3), params)
    assert model.flops_per_token(trained, unembeds=True) == 2 * layers / 4
    assert model.flops_per_token(None, unembeds=True) == 0


@pytest.mark.parametrize("unfrozen", range(4))
def test_split_halves_run_one_after_the_other_and_merge(unfrozen, texts):
    model = GPT2(dataclasses.replace(CONFIG, n_layer=3))
    params = busy_params(model, norm_scale=1.0)
    frozen, trained = model.split(params, unfrozen)
    assert set(trained) == {"layers", "ln_f"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trained["layers"])} == {unfrozen}
    merged = model.merge(frozen, trained)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    tokens, mask = (jnp.asarray(x) for x in pad(texts, 8, "left", 5))
    positions = positions_from(mask)

    @jax.jit
    def halves(frozen, trained):
        x = model.embed(frozen, tokens, positions)
        x, _ = model.layers(frozen["layers"], x, mask, positions)
        x, _ = model.layers(trained["layers"], x, mask, positions)
        return model.final(trained, x)

    full = jax.jit(model.hidden)(params, tokens, mask)
    np.testing.assert_allclose(halves(frozen, trained), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unfrozen", [-1, 3])
def test_split_refuses_more_layers_than_there_are(unfrozen, params):
    with pytest.raises(InputError, match=f"from 0 to n_layer = 2, but is {unfrozen}"):
        MODEL.split(params, unfrozen)
