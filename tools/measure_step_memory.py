"""Memory of training steps of GPT-2 small, by rematerialization and gradient accumulation.

    python tools/measure_step_memory.py

Memory is that of the temporary arrays of the compiled step on one device, without the state and the
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
    """MiB of temporary arrays of a step that donates its first argument."""
    options = compiler_options(jax.default_backend())
    compiled = jax.jit(step, donate_argnums=0, compiler_options=options).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def array(*shape, dtype=jnp.int32):
    """The shape and dtype of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def sft_memory(model, batch_size, length, steps):
    """MiB of a step of supervised fine-tuning, with dropout."""
    settings = sft.Settings(batch_size=batch_size, gradient_accumulation_steps=steps)
    state = jax.eval_shape(lambda: sft.init_state(model, model.init(KEY), settings, KEY))
    tokens, loss_mask = array(batch_size, length), array(batch_size, length, dtype=bool)
    batch = TextBatch(tokens, tokens, loss_mask)
    return temporary(sft.make_step(model, settings), state, batch, KEY)


def ppo_memory(model, batch_size, length, steps, score_batch_size):
    """MiB of scores and updates in minibatches; half of each sequence is the prompt."""
    half = length // 2
    settings = ppo.Settings(
        batch_size=batch_size,
        response_length=half,
        gradient_accumulation_steps=steps,
        score_batch_size=score_batch_size,
    )
    state = jax.eval_shape(lambda: ppo.init_state(model, model.init(KEY), settings, KEY))
    tokens, mask = array(batch_size, half), array(batch_size, half, dtype=bool)
    batch = PromptBatch(tokens, mask, array(batch_size))
    rollout = Rollout(tokens, mask, array(batch_size, half, dtype=jnp.float32))
    scores = array(batch_size, dtype=jnp.float32)
    return temporary(ppo.make_update_step(model, settings), state, batch, rollout, scores, KEY)


def main():
    """Prints a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--batch_size", type=int, default=8, help="batch size of SFT; PPO has 8 times that"
    )
    parser.add_argument("--length", type=int, default=1024, help="of SFT; PPO has an eighth")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    batch_size, length = arguments.batch_size, arguments.length
    plain = GPT2(GPT2Config(n_layer=arguments.layers), arguments.dtype)
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, {arguments.dtype}")
    for remat in ("none", "dots", "full"):
        model = dataclasses.replace(plain, remat=remat)
        for steps in (1, batch_size):
            mib = sft_memory(model, batch_size, length, steps)
            label = f"SFT, {batch_size} x {length}: remat {remat}, {steps} accumulation steps"
            print(f"{label}: {mib:.0f} MiB", flush=True)
    batch_size, length = 8 * batch_size, length // 8
    for remat, steps, scored in (
        ("dots", 1, None),
        ("dots", 1, 8),
        ("dots", 4, None),
        ("dots", 4, 8),
        ("full", 4, 8),
    ):
        model = dataclasses.replace(plain, remat=remat)
        mib = ppo_memory(model, batch_size, length, steps, scored)
        label = (
            f"remat {remat}, {steps} accumulation steps, {scored or batch_size} scored at a time"
        )
        print(f"PPO, {batch_size} x {length}: {label}: {mib:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
