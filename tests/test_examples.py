"""The programs in docs/examples: they learn what they say, and compile as often as they say."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example as Python does for a script: from its own folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_score_rises_in_plain_jax(example, capsys):
    plain_jax = example("plain_jax")
    curve = plain_jax.main()
    assert curve[0] < 0.2
    assert np.mean(curve[-5:]) > 0.85
    assert plain_jax.iterate_compiled._cache_size() == 1
    assert f"iteration  59   score {curve[-1]:.3f} " in capsys.readouterr().out


def test_plain_jax_learns_from_its_advantages_alone(example, monkeypatch):
    plain_jax = example("plain_jax")
    monkeypatch.setattr(plain_jax.functional, "masked_whiten", lambda x, mask: jnp.zeros_like(x))
    assert np.mean(plain_jax.main(iterations=20)[-5:]) < 0.2


def test_the_network_of_plain_jax_scores_the_distribution_it_samples_from(example):
    plain_jax = example("plain_jax")
    params = plain_jax.init_params(jax.random.key(0))
    # Logits far apart: the likeliest token is then the sampled one nearly everywhere.
    params["policy_head"] *= 1000.0
    prompts = 1 + jnp.arange(64) % plain_jax.LETTERS
    tokens = plain_jax.sample(params, prompts, jax.random.key(1))
    logits, _ = plain_jax.forward(params, prompts, tokens)
    assert np.mean(jnp.argmax(logits, axis=-1) == tokens) > 0.95


@pytest.mark.slow
@pytest.mark.newest
def test_losses_fall_and_accuracy_rises_with_flax_nnx(example):
    flax_nnx = example("flax_nnx")
    losses, accuracies = flax_nnx.main()
    assert losses[0] > 2.0
    assert np.mean(losses[-5:]) < 0.5
    assert abs(accuracies[0] - 0.5) < 0.15
    assert accuracies[-1] > 0.9


def test_texts_of_flax_nnx_count_but_for_their_mistakes(example):
    flax_nnx = example("flax_nnx")
    for mistakes in (0, 1, 3):
        tokens, mask = flax_nnx.make_texts(np.random.default_rng(0), 50, mistakes)
        for sequence, real in zip(tokens, mask, strict=True):
            *digits, last = sequence[real]
            expected = (digits[0] - 2 + np.arange(len(digits))) % flax_nnx.DIGITS + 2
            assert np.sum(digits != expected) == mistakes
            assert last == flax_nnx.EOS
            assert (sequence[~real] == flax_nnx.PAD).all()


@pytest.mark.slow
@pytest.mark.newest
def test_the_sweep_is_one_program_and_equals_single_runs(example, capsys, monkeypatch):
    sweep = example("sweep")
    # Rounding differs a little, and may move one sampled token of many; from there on two runs are
    # two samples. In eight iterations that is rare.
    monkeypatch.setattr(sweep, "ITERATIONS", 8)
    metrics = jax.device_get(sweep.main())
    sweep.sweep(sweep.SEEDS + 1, 2 * sweep.CLIP_RANGES, 2 * sweep.KL_COEFS)
    assert sweep.sweep._cache_size() == 1

    pairs = [(clip, coef) for clip in sweep.CLIP_RANGES for coef in sweep.KL_COEFS]
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(pairs)
    train, equal = jax.jit(sweep.train), []
    for index, (clip_range, kl_coef) in enumerate(pairs):
        for column, seed in enumerate(sweep.SEEDS):
            single = train(seed, clip_range, kl_coef)
            for name in ("score", "kl"):
                of_sweep = metrics[name].reshape(len(pairs), len(sweep.SEEDS), -1)[index, column]
                equal.append(np.allclose(single[name], of_sweep, rtol=1e-3, atol=1e-5))
    assert np.mean(equal) > 0.85
    assert train._cache_size() == 1


@pytest.mark.slow
@pytest.mark.newest
def test_the_sweep_shows_what_its_coefficients_do(example, monkeypatch):
    sweep = example("sweep")
    monkeypatch.setattr(sweep, "ITERATIONS", 20)
    metrics = jax.jit(sweep.over_coefs)(sweep.SEEDS, 0.2, jnp.array([0.0, 0.5]))
    free, held = np.mean(metrics["kl"][:, :, -5:], axis=(1, 2))
    assert free > 10 * held
