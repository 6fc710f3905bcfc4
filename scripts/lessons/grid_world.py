"""A grid world: from REINFORCE to PPO, one change at a time, with exact values.

    C . . b .      C  the cat's start
    . b . T .      .  an empty cell:  0
    . b . b .      b  a broom:       -1
    . T . . .      T  a bathtub:    -10, the episode ends
    . . . b M      M  meat:        +100, the episode ends

There are four moves; a move off the grid stays in its cell. With probability SLIP the move is
uniformly random. The policy is a table of logits, and its value is computed exactly from the
probabilities of all moves: no score below is a sample. Value iteration gives the optimal value.

In a language model the cell is the prompt with the previous tokens, a move is a token, and an
episode is a response. Advantages and losses are the same functions.

    python scripts/lessons/grid_world.py [--seed N] [--output DIR]

takes less than a minute on one CPU core: six methods, then a table of surrogates for PPO.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import run
from plots import Cell, Line, bar_plot, line_plot, map_plot, save

from rlhf_jax import functional

LAYOUTS = {
    "garden": ("C..b.", ".b.T.", ".b.b.", ".T...", "...bM"),
    "pocket": ("C....", ".TTT.", ".bMT.", ".T.b.", "....."),
    "shortcut": ("C.b.M", ".TTT.", ".....", ".TTT.", "....."),
    "brooms": ("C.bbb", "..bbb", "bbbbb", "bbb..", "bbb.M"),
}
SIDE = 5
CELLS = SIDE * SIDE
REWARDS = {"C": 0.0, ".": 0.0, "b": -1.0, "T": -10.0, "M": 100.0}
MOVES = ((-1, 0, "↑"), (1, 0, "↓"), (0, -1, "←"), (0, 1, "→"))
SLIP, GAMMA, LAM = 0.1, 0.95, 0.95
EPISODES, LENGTH = 8, 40  # of one iteration, and the maximum number of moves
RUNS, ITERATIONS = 16, 100  # runs of each method on each layout
EPOCHS = 10  # updates of PPO on the same episodes; the other methods make one
RATE = 0.05  # of Adam, for all six methods
RATES = (0.05, 0.1, 0.2)  # for the table of surrogates
UNIT = 100.0  # rewards are divided by the reward of the meat, so that values are near 1

METHODS = ("REINFORCE", "rewards to go", "baseline", "actor-critic", "GAE", "PPO")
optimizer = optax.scale_by_adam()


class Grid(NamedTuple):
    """A layout as arrays."""

    rewards: jax.Array  # f32[CELLS], for entering the cell
    terminal: jax.Array  # bool[CELLS]
    start: jax.Array  # i32[]


class Episodes(NamedTuple):
    """Episodes, [EPISODES, LENGTH] each; the mask is True until the episode ends."""

    cells: jax.Array
    actions: jax.Array
    rewards: jax.Array
    mask: jax.Array


class Surrogate(NamedTuple):
    """A surrogate objective: clipping to `clip_range`, or a KL penalty if `penalized`."""

    clip_range: float = jnp.inf
    penalized: bool = False
    kl_coef: float = 1.0
    kl_target: float = jnp.inf  # inf: the coefficient is fixed


SURROGATES = {
    # name: (surrogate, the value in Table 1 of Schulman et al. 2017)
    "no clipping": (Surrogate(), -0.39),
    "clipping 0.1": (Surrogate(clip_range=0.1), 0.76),
    "clipping 0.2": (Surrogate(clip_range=0.2), 0.82),
    "clipping 0.3": (Surrogate(clip_range=0.3), 0.70),
    "adaptive KL 0.003": (Surrogate(penalized=True, kl_target=0.003), 0.68),
    "adaptive KL 0.01": (Surrogate(penalized=True, kl_target=0.01), 0.74),
    "adaptive KL 0.03": (Surrogate(penalized=True, kl_target=0.03), 0.71),
    "fixed KL 0.3": (Surrogate(penalized=True, kl_coef=0.3), 0.62),
    "fixed KL 1": (Surrogate(penalized=True, kl_coef=1.0), 0.71),
    "fixed KL 3": (Surrogate(penalized=True, kl_coef=3.0), 0.72),
    "fixed KL 10": (Surrogate(penalized=True, kl_coef=10.0), 0.69),
}


# The environment.


def read_grid(layout):
    symbols = "".join(layout)
    rewards = jnp.array([REWARDS[symbol] for symbol in symbols])
    terminal = jnp.array([symbol in "TM" for symbol in symbols])
    return Grid(rewards, terminal, jnp.int32(symbols.index("C")))


def next_cells():
    """The next cell of each move from each cell, i32[CELLS, 4], without slipping."""
    row, column = np.divmod(np.arange(CELLS)[:, None], SIDE)
    down, right = np.array([move[:2] for move in MOVES]).T
    new_row, new_column = row + down, column + right
    inside = (new_row >= 0) & (new_row < SIDE) & (new_column >= 0) & (new_column < SIDE)
    return np.where(inside, SIDE * new_row + new_column, np.arange(CELLS)[:, None])


NEXT = jnp.array(next_cells())


def sample(key, logits, grid):
    """Episodes under the policy with these logits f32[CELLS, 4]."""

    def step(carry, key):
        cell, running = carry
        choice_key, slip_key, any_key = jax.random.split(key, 3)
        action = jax.random.categorical(choice_key, logits[cell])
        slips = jax.random.bernoulli(slip_key, SLIP, cell.shape)
        random_move = jax.random.randint(any_key, cell.shape, 0, 4)
        entered = NEXT[cell, jnp.where(slips, random_move, action)]
        move = Episodes(cell, action, grid.rewards[entered], running)
        return (entered, running & ~grid.terminal[entered]), move

    start = jnp.full(EPISODES, grid.start), jnp.ones(EPISODES, bool)
    episodes = jax.lax.scan(step, start, jax.random.split(key, LENGTH))[1]
    return jax.tree.map(jnp.transpose, episodes)


# Exact values, from the transition probabilities.


def action_values(values, grid):
    """Q(s, a) f32[CELLS, 4], given the values f32[CELLS] of the next cells."""
    entered = grid.rewards + GAMMA * jnp.where(grid.terminal, 0.0, values)
    chosen = entered[NEXT]
    return (1 - SLIP) * chosen + SLIP * jnp.mean(chosen, axis=1, keepdims=True)


def optimal_values(grid):
    """The optimal value of each cell, by value iteration: V <- max_a Q(s, a)."""

    def step(values, _):
        return jnp.max(action_values(values, grid), axis=1), None

    return jax.lax.scan(step, jnp.zeros(CELLS), length=300)[0]


def policy_values(probabilities, grid):
    """The value of each cell under a policy f32[CELLS, 4]: V = R + P V, a linear system."""
    zeros = jnp.zeros(CELLS)
    rewards = jnp.sum(probabilities * action_values(zeros, grid), axis=1)
    through = jax.jacobian(lambda v: jnp.sum(probabilities * action_values(v, grid), axis=1))(zeros)
    return jnp.linalg.solve(jnp.eye(CELLS) - through, rewards)


def score(logits, grid):
    """The exact value of the policy at the start: its mean discounted return."""
    return policy_values(jax.nn.softmax(logits), grid)[grid.start]


# Training.


class State(NamedTuple):
    """The carry of the scan over iterations."""

    params: dict  # the policy's logits f32[CELLS, 4], and the critic's values f32[CELLS]
    opt_state: optax.OptState
    kl_coef: jax.Array


def init_state(surrogate):
    params = {"logits": jnp.zeros((CELLS, 4)), "values": jnp.zeros(CELLS)}
    return State(params, optimizer.init(params), jnp.asarray(surrogate.kl_coef, jnp.float32))


def advantages_and_returns(method, episodes, values):
    """(advantages, returns), the targets of the policy and of the critic.

    An episode that is truncated counts as ended; LENGTH is long enough for that to matter little.
    """
    rewards, mask = episodes.rewards / UNIT, episodes.mask
    returns = functional.rewards_to_go(rewards, mask, gamma=GAMMA)
    if method == "REINFORCE":  # the return of the full episode, past rewards included
        return jnp.broadcast_to(returns[:, :1], returns.shape), returns
    if method == "rewards to go":  # the rewards after each move
        return returns, returns
    # With lam 1 these are the rewards to go less the value of the critic, with lam 0 the one-step
    # temporal-difference error; GAE interpolates, and PPO uses GAE.
    lam = {"baseline": 1.0, "actor-critic": 0.0}.get(method, LAM)
    advantages, returns = functional.gae(rewards, values, mask, gamma=GAMMA, lam=lam)
    if method == "PPO":
        advantages = functional.masked_whiten(advantages, mask)
    return advantages, returns


def logprobs_and_values(params, episodes):
    """(log-probabilities of the moves, values), f32[EPISODES, LENGTH] each."""
    logprobs = jax.nn.log_softmax(params["logits"])[episodes.cells, episodes.actions]
    return logprobs, params["values"][episodes.cells]


def surrogate_loss(surrogate, kl_coef, *batch):
    """(policy loss of PPO, KL from the policy that sampled the episodes)."""
    clipped, _ = functional.ppo_policy_loss(*batch, clip_range=surrogate.clip_range)
    penalized, metrics = functional.kl_penalty_policy_loss(*batch, kl_coef=kl_coef)
    return jnp.where(surrogate.penalized, penalized, clipped), metrics["kl"]


def iterate(state, key, method, grid, surrogate, rate):
    """Samples episodes and updates once, or EPOCHS times for PPO: (state, exact score)."""
    episodes = sample(key, state.params["logits"], grid)
    mask = episodes.mask
    old_logprobs, old_values = logprobs_and_values(state.params, episodes)
    advantages, returns = advantages_and_returns(method, episodes, old_values)

    def loss_fn(params):
        logprobs, values = logprobs_and_values(params, episodes)
        if method == "PPO":
            batch = logprobs, old_logprobs, advantages, mask
            policy_loss, kl = surrogate_loss(surrogate, state.kl_coef, *batch)
        else:
            policy_loss, kl = functional.reinforce_loss(logprobs, advantages, mask)[0], 0.0
        value_loss, _ = functional.ppo_value_loss(values, old_values, returns, mask)
        return policy_loss + value_loss, kl

    def update(carry, _):
        params, opt_state = carry
        gradient, _ = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), opt_state), None

    epochs = EPOCHS if method == "PPO" else 1
    start = state.params, state.opt_state
    (params, opt_state), _ = jax.lax.scan(update, start, length=epochs)
    adapted = functional.penalty_kl_update(
        state.kl_coef, loss_fn(params)[1], target=surrogate.kl_target
    )
    kl_coef = jnp.where(jnp.isinf(surrogate.kl_target), state.kl_coef, adapted)
    return State(params, opt_state, kl_coef), score(params["logits"], grid)


def train(key, method, grid, surrogate, rate):
    """One run: (last logits f32[CELLS, 4], exact score after each iteration)."""

    def step(state, key):
        return iterate(state, key, method, grid, surrogate, rate)

    keys = jax.random.split(key, ITERATIONS)
    state, scores = jax.lax.scan(step, init_state(surrogate), keys)
    return state.params["logits"], scores


@functools.partial(jax.jit, static_argnames="method")
def train_method(keys, method, grids):
    """Runs of a method on each layout, as one program: each result [layouts, RUNS, ...]."""

    def one(key, grid):
        return train(key, method, grid, Surrogate(clip_range=0.2), RATE)

    return jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0))(keys, grids)


@jax.jit
def train_surrogates(keys, grids, surrogates, rates):
    """The last scores of all runs of the table: f32[surrogates, rates, layouts, RUNS]."""

    def one(surrogate, rate, grid, key):
        logits, _ = train(key, "PPO", grid, surrogate, rate)
        return score(logits, grid)

    over_keys = jax.vmap(one, in_axes=(None, None, None, 0))
    over_grids = jax.vmap(over_keys, in_axes=(None, None, 0, None))
    over_rates = jax.vmap(over_grids, in_axes=(None, 0, None, None))
    over_surrogates = jax.vmap(over_rates, in_axes=(0, None, None, None))
    return over_surrogates(surrogates, rates, grids, keys)


def normalized(scores, random_scores):
    """Scores [..., layouts, RUNS] with the random policy at 0 and the best run of each layout at 1.

    Schulman et al., Proximal Policy Optimization Algorithms, section 6.1 (arXiv:1707.06347).
    """
    best = scores.max(axis=(*range(scores.ndim - 2), -1))
    return (scores - random_scores[:, None]) / (best - random_scores)[:, None]


# Output.


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *trees)


def draw_curves(curves, optimum, random, output):
    """A plot of the scores of all methods, means over layouts."""
    steps = np.arange(1, ITERATIONS + 1) * EPISODES
    lines = [
        Line(name, steps, curve.mean(axis=(0, 1)), colour=index)
        for index, (name, curve) in enumerate(curves.items())
    ]
    for name, value, colour in (("optimal policy", optimum, 6), ("random policy", random, 7)):
        lines.append(Line(name, steps, np.full(len(steps), value), colour=colour, dashed=True))
    title = f"Exact value of the policy, mean of {len(LAYOUTS)} layouts with {RUNS} runs each"
    plot = line_plot(title, lines, labels=("episodes", "discounted return"))
    save(output, "methods", plot)


def policy_map(layout, probabilities, values):
    """Cells with the most likely move and their value; a higher value is darker."""
    cells = []
    for cell, symbol in enumerate("".join(layout)):
        if symbol in "TM":
            cells.append(Cell(symbol, f"{REWARDS[symbol]:+g}", 0.0))
            continue
        arrow = MOVES[int(np.argmax(probabilities[cell]))][2]
        name = f"{symbol} " if symbol != "." else ""
        value = round(float(values[cell]))
        cells.append(Cell(arrow, f"{name}{value}", max(value, 0) / 100))
    return [cells[i : i + SIDE] for i in range(0, CELLS, SIDE)]


def draw_maps(logits, scores, name, output):
    """The optimal policy of a layout, and those of the best and the worst run."""
    grid = read_grid(LAYOUTS[name])
    best = optimal_values(grid)
    maps = [("Optimal policy", policy_map(LAYOUTS[name], action_values(best, grid), best))]
    for title, choose in (("PPO, best run", np.argmax), ("PPO, worst run", np.argmin)):
        policy = jax.nn.softmax(logits[choose(scores)])
        values = policy_values(policy, grid)
        maps.append((title, policy_map(LAYOUTS[name], policy, values)))
    note = "Most likely move, and value of the cell. C start, b broom, T bathtub, M meat."
    save(output, "policies", map_plot(maps, note=note))


def draw_surrogates(table, output):
    """A bar plot of the table of surrogates, beside the values of the paper."""
    series = [(f"learning rate {rate:g}", table[:, i]) for i, rate in enumerate(RATES)]
    series.append(("the paper, on MuJoCo", [value for _, value in SURROGATES.values()]))
    title = "Normalised score: random policy 0, best run of each layout 1"
    note = f"mean of {len(LAYOUTS)} layouts with {RUNS} runs each"
    save(output, "surrogates", bar_plot(title, list(SURROGATES), series, note=note))


def main(seed=0, output="runs/lessons/grid_world"):
    """Trains, prints and plots; returns the scores.

    A dict with `curves` {method: f32[layouts, RUNS, ITERATIONS]}, `optimum` and `random`
    f32[layouts], and `table` f32[surrogates, rates, layouts, RUNS], normalised.
    """
    grids = stack([read_grid(layout) for layout in LAYOUTS.values()])
    optimum = np.asarray(jax.vmap(lambda grid: optimal_values(grid)[grid.start])(grids))
    random = np.asarray(jax.vmap(score, in_axes=(None, 0))(jnp.zeros((CELLS, 4)), grids))
    method_key, table_key = jax.random.split(jax.random.key(seed))

    keys, curves = jax.random.split(method_key, RUNS), {}
    shown = (10, 20, 50, ITERATIONS)
    print(f"Value of the policy; random {random.mean():.1f}, optimal {optimum.mean():.1f}")
    print("after episodes " + "".join(f"{EPISODES * step:8}" for step in shown))
    for method in METHODS:
        logits, scores = train_method(keys, method, grids)
        curves[method] = np.asarray(scores)
        means = (curves[method][..., step - 1].mean() for step in shown)
        print(f"{method:14} " + "".join(f"{mean:8.1f}" for mean in means))
    draw_curves(curves, optimum.mean(), random.mean(), Path(output))
    # `logits` of the last method, PPO.
    draw_maps(logits[0], curves["PPO"][0, :, -1], next(iter(LAYOUTS)), Path(output))

    surrogates = stack([surrogate for surrogate, _ in SURROGATES.values()])
    keys = jax.random.split(table_key, RUNS)
    scores = np.asarray(train_surrogates(keys, grids, surrogates, jnp.array(RATES)))
    table = normalized(scores, random)
    print("\nNormalised score   " + "".join(f"  rate {rate:4g}" for rate in RATES) + "   paper")
    for row, (name, (_, paper)) in zip(table.mean(axis=(2, 3)), SURROGATES.items()):
        print(f"{name:18} " + "".join(f"{value:11.2f}" for value in row) + f"{paper:8.2f}")
    draw_surrogates(table.mean(axis=(2, 3)), Path(output))
    return {"curves": curves, "optimum": optimum, "random": random, "table": table}


if __name__ == "__main__":
    run(main, __doc__)
