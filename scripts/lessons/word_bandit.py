"""A contextual bandit of six words: the policy gradient (REINFORCE) with a baseline.

Three words score +1 and three -1. The input is a random word, the output a word that the network
samples, and the score of the output is the only signal. The right word is never shown, so this is
not classification: words that score above the baseline become more probable, words that score below
it less probable. PPO on a language model is the same idea with longer responses.

    python scripts/lessons/word_bandit.py [--seed N] [--output DIR]

takes a few seconds on one CPU core.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import run
from plots import Line, line_plot, save

from rlhf_jax import functional

WORDS = ("happy", "joyful", "pleasant", "sad", "angry", "unpleasant")
SCORES = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
WIDTH = 128
EPSILON = 0.01  # probability of a uniformly random word
BASELINE_RATE = 0.1  # weight of the newest score in the moving average
RUNS, ITERATIONS = 20, 1000

optimizer = optax.adam(3e-4)


class State(NamedTuple):
    """The carry of the scan over iterations."""

    params: dict
    opt_state: optax.OptState
    baseline: jax.Array  # moving average of the scores


# The policy: two layers from a one-hot word to the logits of the six words.


def init_params(key):
    key_in, key_out = jax.random.split(key)
    return {
        "in": jax.random.normal(key_in, (len(WORDS), WIDTH)) / len(WORDS) ** 0.5,
        "in_bias": jnp.zeros(WIDTH),
        "out": jax.random.normal(key_out, (WIDTH, len(WORDS))) / WIDTH**0.5,
        "out_bias": jnp.zeros(len(WORDS)),
    }


def logits_of(params, words):
    one_hot = jax.nn.one_hot(words, len(WORDS))
    hidden = jax.nn.relu(one_hot @ params["in"] + params["in_bias"])
    return hidden @ params["out"] + params["out_bias"]


def choose(key, logits, greedy):
    """A random word with probability EPSILON, else the most likely one or a sample."""
    chance_key, any_key, sample_key = jax.random.split(key, 3)
    sampled = jax.random.categorical(sample_key, logits)
    chosen = jnp.where(greedy, jnp.argmax(logits), sampled)
    is_random = jax.random.bernoulli(chance_key, EPSILON)
    return jnp.where(is_random, jax.random.randint(any_key, (), 0, len(WORDS)), chosen)


def positive_probability(params):
    """The probability of a positive word under the network, a mean over the input words."""
    probabilities = jax.nn.softmax(logits_of(params, jnp.arange(len(WORDS))))
    return jnp.mean(jnp.sum(jnp.where(SCORES > 0, probabilities, 0.0), axis=1))


# Training: one input, one output, one score, one step.


def iterate(state, key, greedy):
    word_key, choice_key = jax.random.split(key)
    word = jax.random.randint(word_key, (), 0, len(WORDS))
    choice = choose(choice_key, logits_of(state.params, word), greedy)
    score = SCORES[choice]
    advantage = score - state.baseline

    def loss_fn(params):
        # The losses take batches of responses, [B, T]; this is one word, [1, 1].
        logprobs = functional.token_logprobs(logits_of(params, word), choice)
        mask = jnp.ones((1, 1), bool)
        return functional.reinforce_loss(logprobs[None, None], advantage[None, None], mask)[0]

    loss, gradient = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    # After the update: the baseline of a score must not contain that score.
    baseline = state.baseline + BASELINE_RATE * advantage
    curves = {"loss": loss, "score": score, "positive": positive_probability(params)}
    return State(params, opt_state, baseline), curves


def train(key, greedy):
    """One run from random parameters: curves f32[ITERATIONS]."""
    init_key, key = jax.random.split(key)
    params = init_params(init_key)
    state = State(params, optimizer.init(params), jnp.float32(0.0))
    keys = jax.random.split(key, ITERATIONS)
    return jax.lax.scan(lambda state, key: iterate(state, key, greedy), state, keys)[1]


# All runs, sampling and argmax, as one program: curves f32[2, RUNS, ITERATIONS].
train_all = jax.jit(jax.vmap(jax.vmap(train, in_axes=(0, None)), in_axes=(None, 0)))


def median_filtered(values, width=31):
    """The moving median, which single large values do not change."""
    padded = np.pad(values, width // 2, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=-1)


def running_frequency(scores, width=50):
    """The share of positive words among the last `width` of each run, or fewer at its start."""
    total = np.cumsum(scores > 0, axis=-1)
    before = np.concatenate([np.zeros_like(total[..., :width]), total[..., :-width]], axis=-1)
    return (total - before) / np.minimum(np.arange(total.shape[-1]) + 1, width)


def draw(curves, output):
    """Three plots: the loss of one run that samples, its moving median, and the share of words."""
    steps, loss = np.arange(1, ITERATIONS + 1), curves["loss"][0, 0]
    labels = "iteration", "loss, -log p * advantage"
    line = Line("", steps, loss, dots=True)
    save(output, "loss", line_plot("Loss of one run", [line], labels=labels))
    line = Line("", steps, median_filtered(loss))
    plot = line_plot("Loss of one run, median of 31 iterations", [line], labels=labels)
    save(output, "loss_median", plot)
    lines = []
    for index, name in enumerate(("sampling", "argmax")):
        frequency = running_frequency(curves["score"][index])[:, 3::4]
        low, high = np.quantile(frequency, [0.1, 0.9], axis=0)
        label = f"{name}: mean of {RUNS} runs, and the middle 80 % of them"
        lines.append(Line(label, steps[3::4], frequency.mean(axis=0), low, high, colour=index))
    labels, title = ("iteration", "share of the last 50 words"), "Frequency of positive words"
    save(output, "positive_words", line_plot(title, lines, labels=labels, y_range=(0.0, 1.02)))


def main(seed=0, output="runs/lessons/word_bandit"):
    """Trains, prints, plots; returns the curves f32[2, RUNS, ITERATIONS], sampling and argmax."""
    keys = jax.random.split(jax.random.key(seed), RUNS)
    curves = jax.device_get(train_all(keys, jnp.array([False, True])))
    frequency, network = running_frequency(curves["score"]), curves["positive"]
    print("            positive words among the last 50     their probability in the network")
    print("iteration          sampling           argmax          sampling             argmax")
    for step in (50, 100, 200, 400, 600, 800, ITERATIONS):
        frequencies, probabilities = (x[:, :, step - 1].mean(axis=1) for x in (frequency, network))
        columns = (*frequencies, *probabilities)
        widths = (17, 16, 17, 18)
        cells = (f"{value:{width}.3f}" for value, width in zip(columns, widths))
        print(f"{step:9} " + " ".join(cells))
    draw(curves, Path(output))
    return curves


if __name__ == "__main__":
    run(main, __doc__)
