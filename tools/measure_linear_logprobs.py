"""Memory and time of `linear_token_logprobs` with gradients, beside a plain computation.

    python tools/measure_linear_logprobs.py

The plain computation has an array of all logits. Memory is that of the temporary arrays of the
compiled program at 8 x 1024 tokens with the vocabulary of GPT-2, without arguments and results; the
program does not run. Times are of a smaller batch, alternating; ratios are medians over rounds.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from rlhf_jax import functional

VOCABULARY, WIDTH = 50257, 768


def plain(hidden, unembedding, tokens):
    """The same values from an array of all logits."""
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    return functional.token_logprobs(logits, tokens), functional.token_entropy(logits)


def linear(chunk_size=None):
    """`linear_token_logprobs` with a chunk size."""
    return lambda *arrays: functional.linear_token_logprobs(*arrays, chunk_size=chunk_size)


def step(function, entropy_weight):
    """A compiled loss with its gradients."""

    def loss(hidden, unembedding, tokens):
        logprobs, entropy = function(hidden, unembedding, tokens)
        return jnp.mean(logprobs) + (entropy_weight * jnp.mean(entropy) if entropy_weight else 0.0)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def memory(function, entropy_weight):
    """MiB of temporary arrays at 8 x 1024 tokens."""
    shapes = ((8, 1024, WIDTH), jnp.float32), ((VOCABULARY, WIDTH), jnp.float32)
    shapes = (*shapes, ((8, 1024), jnp.int32))
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = step(function, entropy_weight).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def seconds(functions, entropy_weight, batch, length, rounds):
    """Seconds of each function in each round, after one round that compiles."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch, length, WIDTH))
    unembedding = 0.02 * jax.random.normal(keys[1], (VOCABULARY, WIDTH))
    tokens = jax.random.randint(keys[2], (batch, length), 0, VOCABULARY)
    steps = [step(function, entropy_weight) for function in functions]
    times = []
    for _ in range(rounds + 1):
        round_times = []
        for each in steps:
            start = time.perf_counter()
            jax.block_until_ready(each(hidden, unembedding, tokens))
            round_times.append(time.perf_counter() - start)
        times.append(round_times)
    return times[1:]


def main():
    """Prints a line for each loss and each function."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    chunk = arguments.length // 2
    functions = {
        "plain": plain,
        "linear, by default": linear(),
        "linear, two chunks": linear(chunk),
    }
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, float32")
    print(f"times at {arguments.batch} x {arguments.length} tokens, memory at 8 x 1024")
    for name, weight in (("log-probabilities", 0.0), ("log-probabilities and entropy", 0.01)):
        times = seconds(
            functions.values(), weight, arguments.batch, arguments.length, arguments.rounds
        )
        full = memory(plain, weight)
        for index, (label, function) in enumerate(functions.items()):
            ratio = statistics.median(each[index] / each[0] for each in times)
            median = statistics.median(each[index] for each in times)
            line = f"{name}: {label}: {median:.2f} s, {ratio:.2f} of plain"
            if label != "linear, two chunks":
                mib = memory(function, weight)
                line += f"; {mib:.0f} MiB, 1/{full / mib:.1f} of plain"
            print(line)


if __name__ == "__main__":
    main()
