"""Memory of train steps of GPT-2 small, with and without rematerialization and parts.

    python tools/measure_step_memory.py

Memory is what the compiler sets aside for temporary arrays on one device, beside the state and the
batch: activations kept for the backward pass, logits, gradients. Steps are compiled and not run.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.backend import compiler_options
from rlhf_jax.batches import PromptBatch, Rollout, TextBatch
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.training import ppo, sft

KEY = jax.random.key(0)


def temporary(step, *shapes):
    """MiB of temporary arrays of a step that consumes its first argument."""
    options = compiler_options(jax.default_backend())
    compiled = jax.jit(step, donate_argnums=0, compiler_options=options).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def array(*shape, dtype=jnp.int32):
    """The form of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def sft_memory(model, rows, length, steps):
    """MiB of a step of supervised fine-tuning, with dropout."""
    settings = sft.Settings(batch_size=rows, gradient_accumulation_steps=steps)
    state = jax.eval_shape(lambda: sft.init_state(model, model.init(KEY), settings, KEY))
    batch = TextBatch(array(rows, length), array(rows, length), array(rows, length, dtype=bool))
    return temporary(sft.make_step(model, settings), state, batch, KEY)


def ppo_memory(model, rows, length, steps, at_once):
    """MiB of scoring and updating, half of each row being the prompt, in four minibatches."""
    half = length // 2
    settings = ppo.Settings(
        batch_size=rows,
        response_length=half,
        gradient_accumulation_steps=steps,
        score_batch_size=at_once,
    )
    state = jax.eval_shape(lambda: ppo.init_state(model, model.init(KEY), settings, KEY))
    tokens, mask = array(rows, half), array(rows, half, dtype=bool)
    batch = PromptBatch(tokens, mask, array(rows))
    rollout = Rollout(tokens, mask, array(rows, half, dtype=jnp.float32))
    scores = array(rows, dtype=jnp.float32)
    return temporary(ppo.make_update_step(model, settings), state, batch, rollout, scores, KEY)


def main():
    """Prints a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8, help="of SFT; PPO has eight times as many")
    parser.add_argument("--length", type=int, default=1024, help="of SFT; PPO's is an eighth")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    rows, length = arguments.rows, arguments.length
    plain = GPT2(GPT2Config(n_layer=arguments.layers), arguments.dtype)
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, {arguments.dtype}")
    for remat in ("none", "dots", "full"):
        model = dataclasses.replace(plain, remat=remat)
        for steps in (1, rows):
            mib = sft_memory(model, rows, length, steps)
            print(
                f"SFT, {rows} x {length}: remat {remat}, {steps} parts: {mib:.0f} MiB", flush=True
            )
    rows, length = 8 * rows, length // 8
    for remat, steps, at_once in (
        ("dots", 1, None),
        ("dots", 1, 8),
        ("dots", 4, None),
        ("dots", 4, 8),
        ("full", 4, 8),
    ):
        mib = ppo_memory(dataclasses.replace(plain, remat=remat), rows, length, steps, at_once)
        what = f"remat {remat}, {steps} parts, {at_once or rows} scored at a time"
        print(f"PPO, {rows} x {length}: {what}: {mib:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
