"""Tabular Q-learning on a line, against the values that can be written down exactly.

    start  .  .  .  .  .  .  goal

Two actions, left and right, and one reward: 1 for the step that reaches the right end, where the
episode is over. Left of the first cell is a wall. Q(s, a) is what the future brings, discounted, if
action a is taken in cell s and the best ones after it. Q-learning estimates it from single steps:

    Q(s, a) += alpha * (r + gamma * max_b Q(s', b) - Q(s, a))

The best way is straight to the right, so the exact values are powers of gamma. What is learned is
independent of how the steps were chosen, as long as each action is tried again and again: the
lesson walks with three shares of chance moves, and the same values come out, more or less quickly.

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
EPSILONS = (0.05, 0.2, 1.0)  # shares of moves by chance; 1 is a walk without any aim
RUNS, STEPS = 20, 30_000


class State(NamedTuple):
    """What one step hands to the next."""

    q: jax.Array  # f32[CELLS, 2]
    cell: jax.Array  # i32[]


def exact_values():
    """Q*(s, a), f32[CELLS, 2]: the reward comes with the step CELLS - s, discounted once per step.

    A step to the left costs itself and the way back, but for the first cell, where it only waits.
    """
    straight = GAMMA ** np.arange(CELLS - 1, -1, -1.0)
    return np.stack([GAMMA * straight[np.maximum(np.arange(CELLS) - 1, 0)], straight], axis=1)


def move(cell, action):
    """The next cell, the reward, and whether the episode is over."""
    next_cell = jnp.maximum(jnp.where(action == RIGHT, cell + 1, cell - 1), 0)
    done = next_cell == CELLS
    return next_cell, done.astype(jnp.float32), done


def choose(key, q, epsilon):
    """By chance with probability epsilon, else the better action; between equals, by chance."""
    chance_key, any_key = jax.random.split(key)
    any_action = jax.random.randint(any_key, (), 0, 2)
    # Without the equals a table of zeros would say "left" for ever.
    by_chance = (q[LEFT] == q[RIGHT]) | jax.random.bernoulli(chance_key, epsilon)
    return jnp.where(by_chance, any_action, jnp.argmax(q))


def step(state, key, epsilon):
    """One move and one update; after the goal the next episode begins in cell 0."""
    q, cell = state
    action = choose(key, q[cell], epsilon)
    next_cell, reward, done = move(cell, action)
    # After the end there is no future; the table has no row for the goal.
    future = jnp.where(done, 0.0, jnp.max(q[jnp.minimum(next_cell, CELLS - 1)]))
    error = reward + GAMMA * future - q[cell, action]
    q = q.at[cell, action].add(ALPHA * error)
    return State(q, jnp.where(done, 0, next_cell)), q


def train(key, epsilon):
    """One run from a table of zeros: the table after each step, f32[STEPS, CELLS, 2]."""
    start = State(jnp.zeros((CELLS, 2)), jnp.int32(0))
    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(lambda state, key: step(state, key, epsilon), start, keys)[1]


# All runs with all shares of chance, as one program: f32[len(EPSILONS), RUNS, STEPS, CELLS, 2].
train_all = jax.jit(jax.vmap(jax.vmap(train, in_axes=(0, None)), in_axes=(None, 0)))


def draw(tables, exact, output):
    """Two plots: how the reward travels back from the goal, and the error for each epsilon."""
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
    """Learns, prints, plots; returns the last tables f32[len(EPSILONS), RUNS, CELLS, 2] and Q*."""
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
