"""Memory and time of the loss of fine-tuning with all logits, and without, by vocabulary.

    python tools/measure_large_vocabulary.py

From hidden states of width 256 of 2 x 512 tokens in float32 to their gradient and to an unembedding
moved by its own, as the last part of a step: by all logits, by `linear_cross_entropy_loss`, and by
`linear_token_logprobs`, as PPO does. Memory is that of the temporary arrays of the compiled program
(with `--steps 0` nothing runs). Times are the least of some steps after the first: seconds, and
seconds of processor time, which other programs on the machine disturb less.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from rlhf_jax import functional
from rlhf_jax.backend import compiler_options
from rlhf_jax.functional.linear import positions_per_chunk

BATCH, LENGTH, WIDTH = 2, 512, 256


def all_logits(hidden, unembedding, tokens, mask):
    """The loss by an array of all logits."""
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding)
    return functional.cross_entropy_loss(logits, tokens, mask)


def linear_logprobs(hidden, unembedding, tokens, mask):
    """The loss by log-probabilities in chunks, whose logits the backward pass computes again."""
    size = positions_per_chunk(*tokens.shape, len(unembedding))
    logprobs, _ = functional.linear_token_logprobs(hidden, unembedding, tokens, chunk_size=size)
    return -functional.masked_mean(logprobs, mask), {}


WAYS = {
    "all logits": all_logits,
    "linear_cross_entropy_loss": functional.linear_cross_entropy_loss,
    "linear_token_logprobs": linear_logprobs,
}


def measure(loss, vocab_size, steps):
    """(MiB of temporary arrays, [(seconds, seconds of processor time) of each step])."""

    def update(unembedding, hidden, tokens, mask):
        (value, _), (for_hidden, gradient) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            hidden, unembedding, tokens, mask
        )
        return unembedding - 0.1 * gradient, value, jnp.sum(for_hidden)

    key = jax.random.key(0)
    unembedding = 0.02 * jax.random.normal(key, (vocab_size, WIDTH))
    hidden = jax.random.normal(key, (BATCH, LENGTH, WIDTH))
    tokens = jax.random.randint(key, (BATCH, LENGTH), 0, vocab_size)
    arrays = (hidden, tokens, jnp.ones(tokens.shape, bool))
    options = compiler_options(jax.default_backend())
    step = jax.jit(update, donate_argnums=0, compiler_options=options)
    compiled, times = step.lower(unembedding, *arrays).compile(), []
    for _ in range(steps):
        start, used = time.perf_counter(), time.process_time()
        unembedding, *_ = jax.block_until_ready(compiled(unembedding, *arrays))
        times.append((time.perf_counter() - start, time.process_time() - used))
    return compiled.memory_analysis().temp_size_in_bytes / 2**20, times


def main():
    """Prints a line for each vocabulary and each way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49_152, 151_936, 262_144])
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, {BATCH} x {LENGTH} tokens")
    for vocab_size in arguments.vocabularies:
        for name, loss in WAYS.items():
            mib, times = measure(loss, vocab_size, arguments.steps)
            line = f"{vocab_size}, {name}: {mib:.0f} MiB"
            if len(times) > 1:
                seconds, processor = (min(each) for each in zip(*times[1:], strict=True))
                line += f", {seconds:.2f} s, {processor:.2f} s of the processor"
            print(line, flush=True)


if __name__ == "__main__":
    main()
