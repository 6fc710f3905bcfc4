"""Tabular Q-learning on a line, compared with the exact values.

    start  .  .  .  .  .  .  goal

There are two actions, left and right, and one reward: 1 for the step that reaches the goal, where
the episode ends. Left of the first cell is a wall. Q(s, a) is the discounted return of action a in
cell s followed by optimal actions. Q-learning estimates it from single steps:

    Q(s, a) += alpha * (r + gamma * max_b Q(s', b) - Q(s, a))

The optimal policy always moves right, so the exact values are powers of gamma. The limit does not
depend on the policy that chose the steps, as long as it tries each action again and again: the
lesson uses three values of epsilon, and all converge to the same table, at different rates.

    python scripts/lessons/q_learning_chain.py [--seed N] [--output DIR]

takes a few seconds on one CPU core.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from command import run
from plots import Line, line_plot, save

CELLS = 8  # 0 to 7; the goal is right of them
LEFT, RIGHT = 0, 1
GAMMA, ALPHA = 0.9, 0.2
EPSILONS = (0.05, 0.2, 1.0)  # probabilities of a random move; 1 is a random walk
RUNS, STEPS = 20, 30_000


class State(NamedTuple):
    """The carry of the scan over steps."""

    q: jax.Array  # f32[CELLS, 2]
    cell: jax.Array  # i32[]


def exact_values():
    """Q*(s, a), f64[CELLS, 2].

    Q*(s, right) = gamma^(CELLS - 1 - s),   Q*(s, left) = gamma * Q*(max(s - 1, 0), right)
    """
    straight = GAMMA ** np.arange(CELLS - 1, -1, -1.0)
    return np.stack([GAMMA * straight[np.maximum(np.arange(CELLS) - 1, 0)], straight], axis=1)


def move(cell, action):
    """(next cell, reward, whether the episode ends)."""
    next_cell = jnp.maximum(jnp.where(action == RIGHT, cell + 1, cell - 1), 0)
    done = next_cell == CELLS
    return next_cell, done.astype(jnp.float32), done


def choose(key, q, epsilon):
    """An epsilon-greedy action; ties are broken at random."""
    chance_key, any_key = jax.random.split(key)
    any_action = jax.random.randint(any_key, (), 0, 2)
    # Without this argmax would always choose "left" from a table of zeros.
    is_random = (q[LEFT] == q[RIGHT]) | jax.random.bernoulli(chance_key, epsilon)
    return jnp.where(is_random, any_action, jnp.argmax(q))


def step(state, key, epsilon):
    """One move and one update; after the goal the next episode starts in cell 0."""
    q, cell = state
    action = choose(key, q[cell], epsilon)
    next_cell, reward, done = move(cell, action)
    # The value of the goal is 0; the table has no entry for it.
    future = jnp.where(done, 0.0, jnp.max(q[jnp.minimum(next_cell, CELLS - 1)]))
    error = reward + GAMMA * future - q[cell, action]
    q = q.at[cell, action].add(ALPHA * error)
    return State(q, jnp.where(done, 0, next_cell)), q


def train(key, epsilon):
    """One run from a table of zeros: the table after each step, f32[STEPS, CELLS, 2]."""
    start = State(jnp.zeros((CELLS, 2)), jnp.int32(0))
    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(lambda state, key: step(state, key, epsilon), start, keys)[1]


# All runs with all values of epsilon, as one program: f32[len(EPSILONS), RUNS, STEPS, CELLS, 2].
train_all = jax.jit(jax.vmap(jax.vmap(train, in_axes=(0, None)), in_axes=(None, 0)))


def draw(tables, exact, output):
    """Two plots: the values of each cell over the first steps, and the error for each epsilon."""
    early = slice(0, 1001, 5)
    steps = np.arange(1, STEPS + 1)
    lines = []
    for cell in range(CELLS):
        values = tables[1, 0, early, cell, RIGHT]
        lines.append(Line(f"cell {cell}", steps[early], values, colour=cell))
        known, ends = exact[cell, RIGHT], steps[early][[0, -1]]
        lines.append(Line("", ends, [known, known], colour=cell, dashed=True))
    title = f"Q(cell, right) of one run, epsilon {EPSILONS[1]:g}; dashed: exact"
    plot = line_plot(title, lines, labels=("step", "Q"), y_range=(0.0, 1.04))
    save(output, "values", plot)

    lines = []
    points = np.arange(99, STEPS, 100)
    for index, epsilon in enumerate(EPSILONS):
        errors = np.abs(tables[index][:, points] - exact).max(axis=(2, 3))
        low, high = np.quantile(errors, [0.1, 0.9], axis=0)
        label = f"epsilon {epsilon:g}"
        lines.append(Line(label, steps[points], np.median(errors, axis=0), low, high, index))
    title = f"Largest error of the table: median of {RUNS} runs, and the middle 80 %"
    labels = "step", "largest |Q - exact|"
    plot = line_plot(title, lines, labels=labels, y_range=(1e-6, 1.2), log=True)
    save(output, "errors", plot)


def main(seed=0, output="runs/lessons/q_learning_chain"):
    """Trains, prints, plots; returns the last tables f32[len(EPSILONS), RUNS, CELLS, 2] and Q*."""
    keys = jax.random.split(jax.random.key(seed), RUNS)
    tables = np.asarray(train_all(keys, jnp.array(EPSILONS)))
    exact = exact_values()
    print(f"Q after {STEPS:,} steps with epsilon {EPSILONS[1]:g}, one run")
    print("cell   left, learned    exact   right, learned    exact")
    for cell, (learned, known) in enumerate(zip(tables[1, 0, -1], exact)):
        left, right = zip(learned, known)
        print(f"{cell:4} {left[0]:15.5f} {left[1]:8.5f} {right[0]:16.5f} {right[1]:8.5f}")
    print(f"Largest error of the table, median of {RUNS} runs")
    print("epsilon " + "".join(f"{f'{step:,} steps':>15}" for step in (1000, 10_000, STEPS)))
    for index, epsilon in enumerate(EPSILONS):
        errors = np.abs(tables[index] - exact).max(axis=(2, 3))
        medians = (np.median(errors[:, step - 1]) for step in (1000, 10_000, STEPS))
        print(f"{epsilon:7g} " + "".join(f"{median:15.2e}" for median in medians))
    draw(tables, exact, Path(output))
    return tables[:, :, -1], exact


if __name__ == "__main__":
    run(main, __doc__)
