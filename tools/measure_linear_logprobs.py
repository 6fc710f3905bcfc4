"""Memory and time of `linear_token_logprobs`, forwards and backwards, beside the plain way.

    python tools/measure_linear_logprobs.py

The plain way makes an array of all logits. Memory is what the compiler sets aside for temporary
arrays at 8 x 1024 tokens of GPT-2's vocabulary, beside arguments and results; nothing of that size
runs. Times are of a smaller batch, the ways in turn, and their ratio is the median over rounds.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from rlhf_jax import functional

VOCABULARY, WIDTH = 50257, 768


def plain(hidden, unembedding, tokens):
    """The same by way of all logits."""
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
        row = []
        for each in steps:
            start = time.perf_counter()
            jax.block_until_ready(each(hidden, unembedding, tokens))
            row.append(time.perf_counter() - start)
        times.append(row)
    return times[1:]


def main():
    """Prints a line for each way and for each loss."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    chunk = arguments.length // 2
    ways = {"plain": plain, "linear, by default": linear(), "linear, two chunks": linear(chunk)}
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, float32")
    print(f"times at {arguments.batch} x {arguments.length} tokens, memory at 8 x 1024")
    for name, weight in (("log-probabilities", 0.0), ("log-probabilities and entropy", 0.01)):
        times = seconds(ways.values(), weight, arguments.batch, arguments.length, arguments.rounds)
        full = memory(plain, weight)
        for index, way in enumerate(ways):
            ratio = statistics.median(row[index] / row[0] for row in times)
            median = statistics.median(row[index] for row in times)
            line = f"{name}: {way}: {median:.2f} s, {ratio:.2f} of plain"
            if way != "linear, two chunks":
                mib = memory(ways[way], weight)
                line += f"; {mib:.0f} MiB, 1/{full / mib:.1f} of plain"
            print(line)


if __name__ == "__main__":
    main()
