"""Generation: against loops without a cache, and the end of a response."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_readers import read_config
from rlhf_jax.models.gpt2 import GPT2
from rlhf_jax.rollout import generate
from tests.models.gpt2_by_loop import log_softmax, logits_by_loop

STATIC = ("temperature", "top_k", "top_p", "stop_token_ids", "min_new_tokens", "max_new_tokens")
STATIC += ("num_responses",)

# One compiled function for all tests: those with the same settings and shapes share its traces.
run = jax.jit(generate, static_argnums=0, static_argnames=STATIC)


def text_of(prompts, row):
    tokens, mask = prompts
    return list(tokens[row][mask[row]])


def greedy_by_loop(model, params, text, length, stops=(), shortest=0):
    """The likeliest token, again and again, each time from a complete forward pass."""
    response = []
    while len(response) < length:
        logits = logits_by_loop(params, model.config, text + response)[-1]
        if len(response) < shortest:
            logits[list(stops)] = -np.inf
        response.append(int(np.argmax(logits)))
        if response[-1] in stops:
            break
    return response


def checked_arrays(rollout, length):
    """Right-padded, and zero off the mask."""
    tokens, mask, logprobs = (np.asarray(x) for x in rollout)
    assert (tokens.dtype, mask.dtype, logprobs.dtype) == (np.int32, bool, np.float32)
    assert tokens.shape == mask.shape == logprobs.shape == (len(mask), length)
    assert (mask[:, 1:] <= mask[:, :-1]).all()
    assert not tokens[~mask].any()
    assert not logprobs[~mask].any()
    assert (logprobs <= 0).all()
    return tokens, mask, logprobs


@pytest.mark.parametrize(("stops", "shortest"), [((), 0), ((3, 6), 0), ((3, 6), 4)], ids=str)
def test_greedy_decoding_matches_a_loop_without_a_cache(stops, shortest, model, params, prompts):
    rollout = run(
        model,
        params,
        *prompts,
        jax.random.key(0),
        max_new_tokens=8,
        temperature=0.0,
        stop_token_ids=stops,
        min_new_tokens=shortest,
    )
    tokens, mask, logprobs = checked_arrays(rollout, 8)
    assert not logprobs.any()
    for row in range(4):
        expected = greedy_by_loop(model, params, text_of(prompts, row), 8, stops, shortest)
        assert tokens[row][mask[row]].tolist() == expected


def distribution_by_loop(model, params, text, response, settings):
    """[T, V] log-probabilities that each response token was drawn from."""
    logits = logits_by_loop(params, model.config, text + response[:-1])[len(text) - 1 :]
    logits = logits / settings.get("temperature", 1.0)
    for t in range(min(settings.get("min_new_tokens", 0), len(logits))):
        logits[t, list(settings["stop_token_ids"])] = -np.inf
    if top_k := settings.get("top_k"):
        smallest = np.sort(logits, axis=1)[:, -top_k, None]
        logits = np.where(logits < smallest, -np.inf, logits)
    return log_softmax(logits)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "stop_token_ids": (3, 6)},
        {"temperature": 1.5, "top_k": 3, "stop_token_ids": (3, 6), "min_new_tokens": 3},
    ],
    ids=str,
)
def test_logprobs_are_those_of_one_forward_pass(settings, model, params, prompts):
    rollout = run(model, params, *prompts, jax.random.key(2), max_new_tokens=8, **settings)
    tokens, mask, logprobs = checked_arrays(rollout, 8)
    for row in range(4):
        response = tokens[row][mask[row]].tolist()
        complete = distribution_by_loop(model, params, text_of(prompts, row), response, settings)
        expected = [complete[t, token] for t, token in enumerate(response)]
        np.testing.assert_allclose(logprobs[row][mask[row]], expected, rtol=1e-3, atol=1e-3)


def many(prompts, examples):
    """The prompts again and again, up to so many examples."""
    return tuple(np.resize(x, (examples, x.shape[1])) for x in prompts)


@pytest.mark.parametrize("shortest", [0, 2])
def test_stop_tokens_end_responses_and_belong_to_them(shortest, model, params, prompts):
    batch = many(prompts, 64)
    settings = {"max_new_tokens": 8, "stop_token_ids": (3, 6), "min_new_tokens": shortest}
    tokens, mask, _ = checked_arrays(run(model, params, *batch, jax.random.key(0), **settings), 8)
    lengths = mask.sum(axis=1)
    for row, length in enumerate(lengths):
        assert not set(tokens[row, : length - 1]) & {3, 6}
        assert length == 8 or tokens[row, length - 1] in (3, 6)
    # All of it happened: the shortest allowed, longer ones, and one that met no stop token.
    assert lengths.min() == shortest + 1
    assert lengths.max() == 8
    assert len(set(lengths)) > 3


GEMMA = {
    "model_type": "gemma2",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "initializer_range": 0.3,
}


@pytest.mark.newest
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_several_responses_from_one_prefill_are_those_of_repeated_prompts(
    family, model, params, prompts
):
    """The draws are those of the same indices; of the second family a layer keeps a window."""
    if family == "gemma2":
        model = Decoder(read_config(GEMMA))
        params = model.init(jax.random.key(3))
    limits = np.array([[7, 3], [7, 7], [2, 7], [7, 7]], np.int32)
    settings = {"max_new_tokens": 7, "temperature": 0.8, "stop_token_ids": (3,)}
    several = run(
        *(model, params, *prompts, jax.random.key(4)),
        **settings,
        max_lengths=limits,
        num_responses=2,
    )
    repeated = (np.repeat(x, 2, axis=0) for x in prompts)
    apart = run(
        *(model, params, *repeated, jax.random.key(4)), **settings, max_lengths=limits.reshape(-1)
    )
    assert several.tokens.shape == several.mask.shape == several.logprobs.shape == (4, 2, 7)
    tokens, mask, logprobs = (np.asarray(x).reshape(8, 7) for x in several)
    np.testing.assert_array_equal(tokens, apart.tokens)
    np.testing.assert_array_equal(mask, apart.mask)
    np.testing.assert_allclose(logprobs, apart.logprobs, atol=2e-5)
    assert (tokens[::2] != tokens[1::2]).any(axis=1).sum() > 1


def test_limits_hold_for_each_response(model, params, prompts):
    limits = np.array([8, 0, 3, 1], np.int32)
    rollout = run(model, params, *prompts, jax.random.key(0), max_new_tokens=8, max_lengths=limits)
    _, mask, _ = checked_arrays(rollout, 8)
    np.testing.assert_array_equal(mask.sum(axis=1), limits)
    free = run(model, params, *prompts, jax.random.key(0), max_new_tokens=8)
    np.testing.assert_array_equal(rollout.tokens, np.where(mask, free.tokens, 0))


def test_a_response_does_not_depend_on_the_other_prompts(model, params, prompts):
    key, settings = jax.random.key(1), {"max_new_tokens": 8, "stop_token_ids": (3, 6)}
    before = run(model, params, *prompts, key, **settings)
    for row in range(4):
        tokens, mask = (x.copy() for x in prompts)
        others = np.arange(4) != row
        tokens[others], mask[others] = (tokens[others] + 1) % 11, False
        mask[others, -1] = True
        after = run(model, params, tokens, mask, key, **settings)
        np.testing.assert_array_equal(after.tokens[row], before.tokens[row])
        np.testing.assert_array_equal(after.mask[row], before.mask[row])
        np.testing.assert_allclose(after.logprobs[row], before.logprobs[row], rtol=1e-5, atol=1e-6)
        assert (after.tokens[others] != before.tokens[others]).any()


def test_padding_is_never_read(model, params, prompts):
    tokens, mask = prompts
    key, settings = jax.random.key(1), {"max_new_tokens": 8, "stop_token_ids": (3, 6)}
    before = run(model, params, tokens, mask, key, **settings)
    for junk in (0, -5, 2**30):
        after = run(model, params, np.where(mask, tokens, junk), mask, key, **settings)
        jax.tree.map(np.testing.assert_array_equal, after, before)


def test_an_example_without_a_prompt_gets_an_empty_response(model, params, prompts):
    tokens, mask = (x.copy() for x in prompts)
    mask[1] = False
    key, settings = jax.random.key(1), {"max_new_tokens": 8, "stop_token_ids": (3, 6)}
    rollout = run(model, params, tokens, mask, key, **settings)
    _, response_mask, _ = checked_arrays(rollout, 8)
    np.testing.assert_array_equal(response_mask.any(axis=1), [True, False, True, True])
    full = run(model, params, *prompts, key, **settings)
    np.testing.assert_array_equal(rollout.tokens[2:], full.tokens[2:])


def test_equal_logits_draw_every_token_and_new_ones_each_step(model, params):
    # With an embedding of zeros all tokens are equally likely, whatever came before.
    flat = {**params, "wte": jax.tree.map(jnp.zeros_like, params["wte"])}
    prompts, mask = np.zeros((512, 1), np.int32), np.ones((512, 1), bool)
    rollout = run(model, flat, prompts, mask, jax.random.key(3), max_new_tokens=8)
    tokens = np.asarray(rollout.tokens)
    np.testing.assert_allclose(rollout.logprobs, -np.log(11), rtol=1e-5)
    expected = 512 / 11
    for t in range(8):
        counts = np.bincount(tokens[:, t], minlength=11)
        assert ((counts - expected) ** 2 / expected).sum() < 30  # 10 degrees of freedom
    for t in range(7):  # a step that reused its key would repeat its tokens
        assert np.mean(tokens[:, t] == tokens[:, t + 1]) == pytest.approx(1 / 11, abs=0.06)
    again = run(model, flat, prompts, mask, jax.random.key(3), max_new_tokens=8)
    np.testing.assert_array_equal(tokens, again.tokens)
    other = run(model, flat, prompts, mask, jax.random.key(4), max_new_tokens=8)
    assert np.mean(tokens == other.tokens) < 0.15


def test_the_first_token_follows_the_model(model, params, prompts):
    batch = tuple(np.resize(x[2:3], (4096, x.shape[1])) for x in prompts)
    rollout = run(model, params, *batch, jax.random.key(0), max_new_tokens=1, temperature=0.7)
    logits = logits_by_loop(params, model.config, text_of(prompts, 2))[-1] / 0.7
    shares = np.bincount(np.asarray(rollout.tokens)[:, 0], minlength=11) / 4096
    np.testing.assert_allclose(shares, np.exp(log_softmax(logits)), atol=0.03)


def test_the_package_offers_the_function_whatever_was_imported_before():
    program = (
        "import rlhf_jax.rollout.generation, rlhf_jax.rollout.score\n"
        "import rlhf_jax.rollout as rollout\n"
        "from rlhf_jax.rollout import generate\n"
        "assert callable(generate) and rollout.generate is generate\n"
        "assert generate is rollout.generation.generate\n"
        "from rlhf_jax.models import load_pretrained\n"
        "import rlhf_jax.models.huggingface as huggingface\n"
        "assert load_pretrained is huggingface.load_pretrained\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclasses.dataclass(frozen=True)
class CountingModel(GPT2):
    """Appends to `steps` whenever a distribution over the next token is computed."""

    steps: list = dataclasses.field(default_factory=list, compare=False)

    def padded_logits(self, params, hidden, *, decode=False):
        jax.debug.callback(functools.partial(self.steps.append, 1))
        return super().padded_logits(params, hidden, decode=decode)


def test_the_loop_ends_with_the_last_response(model, params, prompts):
    counting = CountingModel(model.config)

    def steps(limits):
        counting.steps.clear()
        limits = np.asarray(limits, np.int32)
        rollout = run(
            counting, params, *prompts, jax.random.key(0), max_new_tokens=8, max_lengths=limits
        )
        jax.block_until_ready(rollout)
        jax.effects_barrier()
        return len(counting.steps)

    assert steps([1, 1, 1, 1]) == 1
    assert steps([1, 5, 2, 0]) == 5
    assert steps([8, 1, 1, 1]) == 8


def test_one_trace_for_a_shape(model, params, prompts):
    traces = []

    def traced(params, prompts, mask, key, limits):
        traces.append(prompts.shape)
        return generate(model, params, prompts, mask, key, max_new_tokens=2, max_lengths=limits)

    jitted, (tokens, mask) = jax.jit(traced), prompts
    for seed in range(3):
        limits = np.full(4, seed, np.int32)
        jitted(params, (tokens + seed) % 11, mask & (seed < 2), jax.random.key(seed), limits)
    assert len(traces) == 1


def test_all_positions_can_be_used(model, params, prompts):
    rollout = run(model, params, *prompts, jax.random.key(0), max_new_tokens=11, temperature=0.0)
    expected = greedy_by_loop(model, params, text_of(prompts, 0), 11)
    assert np.asarray(rollout.tokens)[0].tolist() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 12}, "5 tokens and 12 new ones exceed the model's n_positions = 16"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, but is 0"),
        ({"max_new_tokens": 2, "temperature": -1.0}, "but are -1.0, 0 and 1.0"),
        ({"max_new_tokens": 2, "top_k": -1}, "but are 1.0, -1 and 1.0"),
        ({"max_new_tokens": 2, "top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"max_new_tokens": 2, "top_p": 1.1}, "top_p must be above 0 and at most 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_say_what_is_allowed(settings, message, model, params, prompts):
    with pytest.raises(InputError, match=message):
        generate(model, params, *prompts, jax.random.key(0), **settings)


def test_prompts_of_no_width_are_refused(model, params, prompts):
    with pytest.raises(InputError, match="at least one token"):
        generate(model, params, *(x[:, :0] for x in prompts), jax.random.key(0), max_new_tokens=2)
