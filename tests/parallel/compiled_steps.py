"""Steps compiled for eight CPU devices: the traffic between them, and the memory of each.

Nothing is run and no array is made. Started by test_compiled.py in a process of its own: the number
of devices is fixed at start.
"""

import os

if __name__ == "__main__":  # and not when it is looked through for doctests
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import json
import math
import re
import sys

import jax
import jax.numpy as jnp

from rlhf_jax.batches import PromptBatch, TextBatch
from rlhf_jax.models import readout
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.models.decoder_config import DecoderConfig
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import batch_sharding, replicated, tree_shardings
from rlhf_jax.parallel.settings import MeshSettings
from rlhf_jax.training import ppo, sft

# No two sizes are the same, nor are they divided by 2, 4 or 8; nor 3, the queries, keys and values.
LAYERS, WIDTH, HIDDEN, VOCABULARY, PADDED, ROWS = 5, 320, 1216, 1100, 1152, 16
QUERIES, KEYS = 12 * 28, 4 * 28
MODELS = {
    "gpt2": GPT2(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=8,
            n_inner=HIDDEN,
        )
    ),
    "qwen3": Decoder(
        DecoderConfig(VOCABULARY, WIDTH, HIDDEN, LAYERS, 12, 4, 28, 64, qk_norm="head")
    ),
}
PROMPT, RESPONSE = 24, 16


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((ROWS, *shape), dtype)


def tokens(length):
    return array(length), array(length, dtype=bool)


def sft_parts(model):
    """(init, step, batch, whether the step returns a rollout) of supervised fine-tuning."""
    settings = sft.Settings(batch_size=ROWS)
    batch = TextBatch(array(40), array(40), array(40, dtype=bool), array(24))
    return (
        lambda key: sft.init_state(model, model.init(key), settings, key),
        sft.make_step(model, settings),
        batch,
        False,
    )


def ppo_parts(model):
    """The same of a full iteration of PPO."""
    settings = ppo.Settings(batch_size=ROWS, num_mini_batches=1, response_length=RESPONSE)

    def init(key):
        own = model.without_unembedding(model.init(key))
        scorer = {"model": own, "head": {"kernel": jnp.ones(WIDTH)}}
        return ppo.init_state(model, model.init(key), settings, key, reward_params=scorer)

    step = ppo.make_step(model, settings, stop_token_ids=(5,))
    return init, step, PromptBatch(*tokens(PROMPT), array()), True


def rollout_parts(model):
    """The same of PPO's sampling alone."""
    init, _, batch, _ = ppo_parts(model)
    settings = ppo.Settings(batch_size=ROWS, num_mini_batches=1, response_length=RESPONSE)
    sample = ppo.make_rollout_step(model, settings, stop_token_ids=(5,))
    return init, lambda *args: (None, None, sample(*args)), batch, True


def compiled(model, parts, sizes):
    """The program of a step of a model on a mesh."""
    init, step, batch, returns_rollout = parts
    mesh = make_mesh(MeshSettings(*sizes))
    key = jax.eval_shape(lambda: jax.random.key(0))
    shape = jax.eval_shape(init, key)
    state = tree_shardings(mesh, shape, model.partition_rules)
    by_batch, full = batch_sharding(mesh), replicated(mesh)
    made = jax.eval_shape(step, shape, batch, key)
    outs = (None if made[0] is None else state, full, *([by_batch] if returns_rollout else []))
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, in_shardings=(state, by_batch, full), out_shardings=outs)
        return jitted.lower(shape, batch, key).compile()


def gathered(text):
    """The shape of each array that the all-gathers of a program yield."""
    shapes = []
    for line in text.splitlines():
        if match := re.search(r" = (.*?) all-gather(?:-start)?\(", line):
            shapes += [
                [int(size) for size in dims.split(",") if size]
                for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])
            ]
    return shapes


def bytes_per_device(sizes):
    """Bytes of the state of GPT-2's width and vocabulary: (on one device, of all)."""
    model = GPT2(GPT2Config(n_layer=2))
    parts = sft_parts(model)
    state = jax.eval_shape(parts[0], jax.eval_shape(lambda: jax.random.key(0)))
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    analysis = compiled(model, parts, sizes).memory_analysis()
    batch = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts[2]))
    return analysis.argument_size_in_bytes - batch // math.prod(sizes[:2]), total


def main():
    parts = {
        "sft": sft_parts,
        "linear": sft_parts,
        "ppo": ppo_parts,
        "rollout": rollout_parts,
    }
    steps, stacks = {}, {}
    for program in sys.argv[1:]:
        family, name, mesh = program.split()
        readout.LINEAR_VOCABULARY = 1 if name == "linear" else VOCABULARY + 1
        model, sizes = MODELS[family], tuple(map(int, mesh.split("x")))
        text = compiled(model, parts[name](model), sizes).as_text()
        steps[program] = gathered(text)
        stacks[program] = sorted(set(re.findall(rf"f32\[{LAYERS},[\d,]*\]", text)))
    report = {"gathered": steps, "stacks": stacks, "bytes": bytes_per_device((1, 8, 1))}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
