"""The claims of docs/lessons.md, tested on the lessons."""

import importlib
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
LESSONS = ROOT / "scripts" / "lessons"
NAMES = ("word_bandit", "q_learning_chain", "grid_world")


@pytest.fixture(scope="module")
def lesson():
    """Imports a lesson as a script does, with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LESSONS)
        yield importlib.import_module
        for path in LESSONS.glob("*.py"):
            sys.modules.pop(path.stem, None)


def check_plots(folder, names):
    """Checks that each plot is an SVG file of curves, bars or cells with finite coordinates."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{x}.svg" for x in names)
    for path in folder.iterdir():
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        drawn = [node for node in root.iter() if node.tag.rpartition("}")[2] in ("path", "rect")]
        assert len(drawn) > 1
        assert not any("nan" in value for node in root.iter() for value in node.attrib.values())


# The bandit of words.


@pytest.fixture(scope="module")
def bandit(lesson, tmp_path_factory):
    module, folder = lesson("word_bandit"), tmp_path_factory.mktemp("bandit")
    return module, module.main(seed=3, output=folder), folder


def test_positive_words_become_frequent(bandit):
    module, curves, _ = bandit
    frequency = module.running_frequency(curves["score"])
    assert np.all(np.abs(frequency[:, :, 0].mean(axis=1) - 0.5) < 0.4)
    assert np.all(frequency[:, :, -1].mean(axis=1) > 0.9)
    # In each run, not only in the mean.
    assert np.all(frequency[:, :, -1] > 0.7)
    sampling, argmax = frequency[:, :, 199].mean(axis=1)
    assert argmax > sampling + 0.2


def test_with_argmax_the_network_stops_learning_when_its_most_likely_word_is_right(bandit):
    _, curves, _ = bandit
    sampling, argmax = curves["positive"][:, :, -1].mean(axis=1)
    assert sampling > 0.9
    assert argmax < 0.8


def test_the_bandit_is_one_program_and_writes_its_plots(bandit):
    module, curves, folder = bandit
    assert module.train_all._cache_size() == 1
    assert {x.shape for x in curves.values()} == {(2, module.RUNS, module.ITERATIONS)}
    check_plots(folder, ["loss", "loss_median", "positive_words"])


def test_one_step_of_the_bandit_is_the_policy_gradient(lesson):
    """-advantage * d log p by hand; the first step of Adam keeps its sign alone."""
    module = lesson("word_bandit")
    params = module.init_params(jax.random.key(0))
    state = module.State(params, module.optimizer.init(params), jnp.float32(0.3))
    new, curves = jax.jit(module.iterate)(state, jax.random.key(5), False)
    word_key, choice_key = jax.random.split(jax.random.key(5))
    word = int(jax.random.randint(word_key, (), 0, 6))
    logits = np.asarray(module.logits_of(params, word), np.float64)
    choice = int(module.choose(choice_key, jnp.asarray(logits, jnp.float32), False))
    probabilities = np.exp(logits) / np.exp(logits).sum()
    advantage = (1.0 if choice < 3 else -1.0) - 0.3
    np.testing.assert_allclose(curves["loss"], -advantage * np.log(probabilities[choice]), 1e-5)
    gradient = -advantage * (np.eye(6)[choice] - probabilities)
    step = np.asarray(new.params["out_bias"] - params["out_bias"])
    np.testing.assert_allclose(step, -3e-4 * np.sign(gradient), rtol=1e-3)
    np.testing.assert_allclose(new.baseline, 0.3 + 0.1 * advantage, rtol=1e-6)


def test_random_words_have_frequency_epsilon(lesson):
    module = lesson("word_bandit")
    keys = jax.random.split(jax.random.key(0), 100_000)
    logits = jnp.array([0.0, 0.0, 9.0, 0.0, 0.0, 0.0])
    words = jax.vmap(module.choose, in_axes=(0, None, None))(keys, logits, True)
    assert np.mean(words != 2) == pytest.approx(module.EPSILON * 5 / 6, rel=0.1)


def test_the_median_filter_removes_single_spikes(lesson):
    median_filtered = lesson("word_bandit").median_filtered
    values = np.arange(9.0)
    values[4] = 100.0
    np.testing.assert_array_equal(median_filtered(values, 3), [1, 1, 2, 3, 5, 6, 6, 7, 7])


# Q-learning on a line.


@pytest.fixture(scope="module")
def chain(lesson, tmp_path_factory):
    module, folder = lesson("q_learning_chain"), tmp_path_factory.mktemp("chain")
    return module, module.main(seed=3, output=folder), folder


def test_q_values_converge_for_each_epsilon(chain):
    _, (tables, exact), _ = chain
    np.testing.assert_allclose(tables[1:], np.broadcast_to(exact, tables[1:].shape), atol=1e-5)
    # With a small epsilon steps to the left are rare.
    np.testing.assert_allclose(tables[0], np.broadcast_to(exact, tables[0].shape), atol=1e-2)


def test_the_exact_q_values_are_those_of_value_iteration(chain):
    module, (_, exact), _ = chain
    q = np.zeros((module.CELLS + 1, 2))
    for _ in range(100):
        for cell in range(module.CELLS):
            left, right = q[max(cell - 1, 0)].max(), q[cell + 1].max()
            q[cell] = [0.9 * left, float(cell == module.CELLS - 1) + 0.9 * right]
    np.testing.assert_allclose(exact, q[:-1], rtol=1e-12)


def test_the_chain_is_one_program_and_writes_its_plots(chain):
    module, _, folder = chain
    assert module.train_all._cache_size() == 1
    check_plots(folder, ["values", "errors"])


# The cat on the grid.


@pytest.fixture(scope="module")
def grid_world(lesson, tmp_path_factory):
    """Four runs in place of sixteen; they take less time than their compilation."""
    module, folder = lesson("grid_world"), tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RUNS", 4)
        return module, module.main(seed=3, output=folder), folder


@pytest.mark.slow
@pytest.mark.newest
def test_every_method_scores_between_the_random_and_the_optimal_policy(grid_world):
    module, result, _ = grid_world
    for method in module.METHODS:
        scores = result["curves"][method]
        assert np.all(scores <= result["optimum"][:, None, None] + 1e-3), method
        final = scores[:, :, -1].mean(axis=1)
        assert np.all(final > result["random"] + 20.0), method
        assert np.all(final > scores[:, :, 0].mean(axis=1) + 20.0), method
        assert final.mean() > 55.0, method


@pytest.mark.slow
@pytest.mark.newest
def test_ppo_learns_from_the_fewest_episodes(grid_world):
    module, result, _ = grid_world
    means = {name: x[:, :, 19].mean() for name, x in result["curves"].items()}
    assert means.pop("PPO") > 2 * max(means.values())
    assert max(means, key=means.get) == "GAE"


@pytest.mark.slow
@pytest.mark.newest
def test_without_clipping_a_large_learning_rate_scores_lowest(grid_world):
    module, result, _ = grid_world
    names = list(module.SURROGATES)
    table = result["table"].mean(axis=(2, 3))
    assert table.shape == (11, 3)
    # Clipping scores higher at each rate, and the gap grows with the rate.
    gaps = table[names.index("clipping 0.1")] - table[names.index("no clipping")]
    assert np.all(gaps > 0)
    assert gaps[0] < gaps[1] < gaps[2]
    assert names[np.argmin(table[:, 2])] == "no clipping"


@pytest.mark.slow
@pytest.mark.newest
def test_the_grid_is_one_program_per_method_and_one_for_the_table(grid_world):
    module, _, folder = grid_world
    assert module.train_method._cache_size() == len(module.METHODS)
    assert module.train_surrogates._cache_size() == 1
    check_plots(folder, ["methods", "policies", "surrogates"])


def transition(module, layout, cell, move):
    """(cell, reward, whether the episode ends) after a move that does not slip, by hand."""
    row, column = divmod(cell, 5)
    down, right = ((-1, 0), (1, 0), (0, -1), (0, 1))[move]
    if 0 <= row + down < 5 and 0 <= column + right < 5:
        row, column = row + down, column + right
    symbol = layout[row][column]
    return 5 * row + column, module.REWARDS[symbol], symbol in "TM"


def bellman_by_loop(module, layout, choose):
    """Values f64[25] under `choose(cell, q[4])`, by repeated Bellman backups."""
    values = np.zeros(25)
    for _ in range(400):
        new = np.zeros(25)
        for cell in range(25):
            moves = [transition(module, layout, cell, move) for move in range(4)]
            q = np.array([r + (0.0 if ends else 0.95 * values[to]) for to, r, ends in moves])
            new[cell] = choose(cell, 0.9 * q + 0.1 * q.mean())
        values = new
    return values


@pytest.mark.parametrize("name", ["garden", "shortcut"])
def test_exact_values_are_those_of_a_loop(lesson, name):
    module = lesson("grid_world")
    layout, grid = module.LAYOUTS[name], module.read_grid(module.LAYOUTS[name])
    best = bellman_by_loop(module, layout, lambda cell, q: q.max())
    np.testing.assert_allclose(module.optimal_values(grid), best, rtol=1e-4)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), 25).astype(np.float32)
    expected = bellman_by_loop(module, layout, lambda cell, q: q @ policy[cell])
    np.testing.assert_allclose(module.policy_values(policy, grid), expected, rtol=1e-3, atol=1e-3)


def test_the_mean_return_of_sampled_episodes_is_the_exact_value(lesson):
    module = lesson("grid_world")
    grid = module.read_grid(module.LAYOUTS["garden"])
    logits = 2.0 * jax.random.normal(jax.random.key(0), (25, 4)) + jnp.array([0.0, 2.0, 0.0, 2.0])
    sample = jax.vmap(module.sample, in_axes=(0, None, None))
    episodes = jax.jit(sample)(jax.random.split(jax.random.key(1), 4000), logits, grid)
    discounts = 0.95 ** np.arange(module.LENGTH)
    returns = np.sum(episodes.rewards * episodes.mask * discounts, axis=-1)
    error = returns.std() / returns.size**0.5
    assert abs(returns.mean() - module.score(logits, grid)) < 4 * error + 0.5
    # The mask ends at the end of the episode.
    lengths = np.asarray(episodes.mask).sum(-1)
    last = np.take_along_axis(np.asarray(episodes.rewards), lengths[..., None] - 1, -1)[..., 0]
    ended = lengths < module.LENGTH
    assert ended.mean() > 0.5
    assert set(np.unique(last[ended])) == {-10.0, 100.0}


def test_advantages_of_each_method_by_hand(lesson):
    module = lesson("grid_world")
    rewards = jnp.array([[0.0, -1.0, 100.0, 7.0]])
    mask = jnp.array([[True, True, True, False]])
    values = jnp.array([[0.1, 0.2, 0.4, 9.0]])
    episodes = module.Episodes(None, None, rewards, mask)
    advantages = {
        method: np.asarray(module.advantages_and_returns(method, episodes, values)[0])[0, :3]
        for method in module.METHODS
    }
    to_go = np.array([0.95 * (-0.01 + 0.95), -0.01 + 0.95, 1.0])
    errors = np.array([0.95 * 0.2 - 0.1, -0.01 + 0.95 * 0.4 - 0.2, 1.0 - 0.4])
    decay = 0.95 * 0.95
    gae = [errors[0] + decay * (errors[1] + decay * errors[2]), errors[1] + decay * errors[2]]
    gae = np.array([*gae, errors[2]])
    np.testing.assert_allclose(advantages["REINFORCE"], to_go[[0, 0, 0]], rtol=1e-5)
    np.testing.assert_allclose(advantages["rewards to go"], to_go, rtol=1e-5)
    np.testing.assert_allclose(advantages["baseline"], to_go - [0.1, 0.2, 0.4], rtol=1e-5)
    np.testing.assert_allclose(advantages["actor-critic"], errors, rtol=1e-5)
    np.testing.assert_allclose(advantages["GAE"], gae, rtol=1e-5)
    np.testing.assert_allclose(advantages["PPO"], (gae - gae.mean()) / gae.std(ddof=1), rtol=1e-4)


def test_only_a_surrogate_with_a_target_adapts_its_kl_coefficient(lesson):
    module = lesson("grid_world")
    grid = module.read_grid(module.LAYOUTS["garden"])
    step = jax.jit(module.iterate, static_argnames="method")
    coefs = {}
    for name, (surrogate, _) in module.SURROGATES.items():
        state, coef = module.init_state(surrogate), []
        for key in jax.random.split(jax.random.key(0), 6):
            state, _ = step(state, key, "PPO", grid, surrogate, 0.2)
            coef.append(float(state.kl_coef))
        coefs[name] = coef
    assert coefs["fixed KL 3"] == [3.0] * 6
    assert coefs["clipping 0.2"] == [1.0] * 6
    assert len(set(coefs["adaptive KL 0.003"])) > 1
    assert coefs["adaptive KL 0.003"][-1] > coefs["adaptive KL 0.03"][-1]


def test_scores_are_normalised_as_in_the_paper(lesson):
    scores = np.array([[[10.0, 20.0]], [[0.0, 5.0]]])  # [surrogates, layouts, RUNS]
    normal = lesson("grid_world").normalized(scores, np.array([10.0]))
    np.testing.assert_allclose(normal, [[[0.0, 1.0]], [[-1.0, -0.5]]])


# The command line.


@pytest.fixture
def command(lesson, monkeypatch, capsys):
    """Runs a lesson that ends early: (exit status, standard output, standard error)."""

    def run(name, *flags):
        path = str(LESSONS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", NAMES)
def test_help_describes_the_lesson(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    assert "--seed" in out
    assert f"scripts/lessons/{name}.py" in out


def test_wrong_flags_are_one_line_before_the_training(command, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = command("grid_world", "--output", str(tmp_path / "file"))
    assert status == 2
    assert err.startswith(f"error: --output {tmp_path}/file cannot be a folder of plots: ")
    assert err.count("\n") == 1
    status, _, err = command("word_bandit", "--seed", "-1", "--output", str(tmp_path))
    assert status == 2
    assert err == "error: --seed is -1; give a whole number from 0 to 4294967295.\n"


def test_a_lesson_runs_as_a_command(tmp_path):
    flags = ["--seed", "1", "--output", str(tmp_path / "plots")]
    line = [sys.executable, str(LESSONS / "q_learning_chain.py"), *flags]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Largest error of the table" in done.stdout
    check_plots(tmp_path / "plots", ["values", "errors"])
