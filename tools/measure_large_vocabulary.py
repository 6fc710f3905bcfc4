"""Memory and time of a step of fine-tuning with all logits, and without, by vocabulary.

    python tools/measure_large_vocabulary.py

A decoder of two layers and width 256 trains on 2 x 512 tokens in float32. Memory is that of the
temporary arrays of the compiled step. Times are the least of some steps after the first: seconds,
and seconds of processor time, which other programs on the machine disturb less.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from rlhf_jax.backend import compiler_options
from rlhf_jax.batches import TextBatch
from rlhf_jax.models import readout
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.training import sft

BATCH, LENGTH = 2, 512
KEY = jax.random.key(0)


def measure(vocab_size, threshold, steps):
    """(MiB of temporary arrays, seconds, seconds of processor time) of a step."""
    readout.LINEAR_VOCABULARY = threshold
    model = Decoder(DecoderConfig(vocab_size, 256, 512, 2, 4, 4, 64, LENGTH))
    settings = sft.Settings(batch_size=BATCH)
    tokens = jax.random.randint(KEY, (BATCH, LENGTH), 0, vocab_size)
    batch = TextBatch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))
    state = jax.jit(lambda key: sft.init_state(model, model.init(key), settings, key))(KEY)
    options = compiler_options(jax.default_backend())
    step = jax.jit(sft.make_step(model, settings), donate_argnums=0, compiler_options=options)
    compiled = step.lower(state, batch, KEY).compile()
    times = []
    for _ in range(1 + steps):
        start, used = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(compiled(state, batch, KEY))
        times.append((time.perf_counter() - start, time.process_time() - used))
    mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return mib, *(min(each) for each in zip(*times[1:], strict=True))


def main():
    """Prints a line for each vocabulary and each way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49_152, 151_936, 262_144])
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, {BATCH} x {LENGTH} tokens")
    for vocab_size in arguments.vocabularies:
        for name, threshold in (("all logits", vocab_size + 1), ("linear", vocab_size)):
            mib, seconds, processor = measure(vocab_size, threshold, arguments.steps)
            line = f"{vocab_size}, {name}: {mib:.0f} MiB, {seconds:.2f} s"
            print(f"{line}, {processor:.2f} s of the processor", flush=True)


if __name__ == "__main__":
    main()
