"""A table of training runs from one compiled program.

The task and the network are those of plain_jax.py. Every clip range, KL coefficient and seed is a
run of its own, and all of them train side by side as one batch:

    python docs/examples/sweep.py

takes about ten seconds on one CPU core, most of them for compiling: once, since clip ranges and KL
coefficients are arrays like any other. Its 18 runs then take less than two seconds.
"""

import jax
import jax.numpy as jnp
from plain_jax import init_state, iterate

CLIP_RANGES = jnp.array([0.02, 0.2, 1.0])
KL_COEFS = jnp.array([0.0, 0.02, 0.05])
SEEDS = jnp.arange(2)
ITERATIONS = 40


def train(seed, clip_range, kl_coef):
    """One run, from fresh parameters on: metrics f32[ITERATIONS] each."""
    init_key, key = jax.random.split(jax.random.key(seed))

    def step(state, key):
        return iterate(state, key, clip_range, kl_coef)

    keys = jax.random.split(key, ITERATIONS)
    return jax.lax.scan(step, init_state(init_key), keys)[1]


# Each vmap adds an axis in front: [clip ranges, KL coefficients, seeds, ITERATIONS].
over_seeds = jax.vmap(train, in_axes=(0, None, None))
over_coefs = jax.vmap(over_seeds, in_axes=(None, None, 0))
over_ranges = jax.vmap(over_coefs, in_axes=(None, 0, None))
sweep = jax.jit(over_ranges)


def main():
    """Trains all runs, prints a row for each pair of coefficients, and returns the metrics."""
    metrics = sweep(SEEDS, CLIP_RANGES, KL_COEFS)
    # Means over the seeds and over the last five iterations.
    last = jax.tree.map(lambda x: jnp.mean(x[..., -5:], axis=(-2, -1)), metrics)
    print("clip range   KL coefficient   score   KL in nats per word")
    for row, clip_range in enumerate(CLIP_RANGES):
        for column, kl_coef in enumerate(KL_COEFS):
            score, kl = last["score"][row, column], last["kl"][row, column]
            print(f"{clip_range:10.2f} {kl_coef:16.2f} {score:7.3f} {kl:21.2f}")
    return metrics


if __name__ == "__main__":
    main()
