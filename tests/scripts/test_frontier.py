"""The script of the reward-KL frontier: pairs, frontiers, tables, and a tiny run."""

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import PairBatch, PromptBatch
from rlhf_jax.data.tokenizers import train_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import save_pretrained
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.runtime import config
from rlhf_jax.training.state import init_train_state
from tests import small

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["A good film, and a long one.", "A dull film that is far too long."] * 8
RATE = 0.1
CONFIG = {
    "optimizer": {"dpo": {"learning_rate": RATE, "eps": 1.0, "max_grad_norm": None}},
    "data": {"max_prompt_length": 8, "prompt_tokens": [2, 8], "eval_rows": 8},
    "gold": "tests.scripts.test_frontier:words",
    "frontier": {
        "dpo_beta": [0.5],
        "ipo_beta": [],
        "sft": False,
        "ppo_kl_coef": [0.1, 0.2],
        "seeds": [0],
        "num_prompts": 12,
        "num_completions": 3,
        "num_points": 2,
        "steps": 2,
        "batch_size": 4,
    },
    "ppo": {
        "total_episodes": 16,
        "batch_size": 8,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "response_length": 4,
        "stop_at_eos": False,
    },
}


def words(prompts, completions):
    """A gold score: the number of different characters of a continuation."""
    return [float(len(set(text))) for text in completions]


@pytest.fixture(scope="module")
def frontier():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / "lessons")
        from scripts import frontier

        yield frontier


@pytest.fixture(scope="module")
def settings(frontier, tmp_path_factory):
    """The configuration of a tiny run, in whose folder the fine-tuned model is already."""
    folder = tmp_path_factory.mktemp("frontier")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in TEXTS))
    tokenizer, rng = train_tokenizer(TEXTS, 270), np.random.default_rng(0)
    model = GPT2(GPT2Config(len(tokenizer), 16, 8, 1, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0.0, 0.5, x.shape).astype(np.float32), shapes)
    save_pretrained(folder / "run" / "sft" / "hf", model, params, tokenizer)
    data = {**CONFIG["data"], "path": str(folder / "texts.jsonl")}
    values = {**CONFIG, "data": data, "run_dir": str(folder / "run")}
    return config.resolve(frontier.Config, values)


@pytest.mark.newest
def test_a_run_adds_missing_points_and_draws_them(frontier, settings, capsys):
    file = Path(settings.run_dir) / "points.jsonl"
    done = frontier.Point("ppo", 0.2, 0, 2, 3.0, 4.0, 5.0)
    frontier.report.add_points(file, [done])
    frontier.main(settings)
    entries = small.entries(file)
    assert entries[0] == done._asdict()
    names = [(each["method"], each["coefficient"], each["step"]) for each in entries[1:]]
    assert names == [
        ("start", 0.0, 0),
        ("dpo", 0.5, 1),
        ("dpo", 0.5, 2),
        ("ppo", 0.1, 1),
        ("ppo", 0.1, 2),
    ]
    assert entries[1]["kl"] == pytest.approx(0.0, abs=1e-3)  # of the fine-tuned model to itself
    assert all(1.0 <= each["gold"] <= 40.0 for each in entries)
    first = capsys.readouterr().out
    assert first.count("step") == 5
    table = "| method |" + first.split("| method |")[1]
    assert "| PPO on the gold score | kl_coef 0.2 | 3.00 | 4.00 |" in table
    assert ET.parse(file.with_name("frontier.svg")).getroot().tag.endswith("svg")
    frontier.main(settings)
    assert small.entries(file) == entries
    assert capsys.readouterr().out == table
    other = dataclasses.replace(settings.frontier, steps=4)
    with pytest.raises(InputError, match="holds points of other settings"):
        frontier.main(dataclasses.replace(settings, frontier=other))


def test_pairs_are_of_one_prompt_and_differ_in_their_gold_scores(frontier):
    rng = np.random.default_rng(0)
    prompts = PromptBatch(np.arange(10).reshape(5, 2), np.ones((5, 2), bool), np.arange(5))
    tokens, gold = rng.integers(0, 9, (5, 4, 3)), rng.integers(0, 3, (5, 4)).astype(np.float32)
    mask, logprobs = rng.random((5, 4, 3)) < 0.5, rng.random((5, 4))
    pairs = frontier.pairs_of(prompts, frontier.Continuations(tokens, mask, logprobs, gold))
    expected = [
        (n, i, j) for n in range(5) for i in range(4) for j in range(4) if gold[n, i] > gold[n, j]
    ]
    assert len(pairs.valid) == len(expected)
    for k, (n, i, j) in enumerate(expected):
        np.testing.assert_array_equal(pairs.prompts[k], prompts.prompts[n])
        np.testing.assert_array_equal(pairs.chosen[k], tokens[n, i])
        np.testing.assert_array_equal(pairs.rejected_mask[k], mask[n, j])
        assert (pairs.ref_chosen[k], pairs.ref_rejected[k]) == (logprobs[n, i], logprobs[n, j])
    with pytest.raises(InputError, match="are equal"):
        frontier.pairs_of(prompts, frontier.Continuations(tokens, mask, logprobs, 0 * gold))


def losses(model, params, batch, beta):
    """f32[3], of DPO, IPO and supervised fine-tuning, as their papers write them."""
    prompts, real = (jnp.tile(x, (2, 1)) for x in (batch.prompts, batch.prompt_mask))
    tokens = jnp.concatenate([batch.chosen, batch.rejected])
    mask = jnp.concatenate([batch.chosen_mask, batch.rejected_mask])
    texts = jnp.concatenate([prompts, tokens], axis=1), jnp.concatenate([real, mask], axis=1)
    logits = model.logits(params, model.hidden(params, *texts))[:, prompts.shape[1] - 1 : -1]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=2)[..., 0]
    chosen, rejected = jnp.split(jnp.sum(logprobs * mask, axis=1), 2)
    h = chosen - batch.ref_chosen - (rejected - batch.ref_rejected)
    dpo = -jnp.mean(jnp.log(1 / (1 + jnp.exp(-beta * h))))
    ipo = jnp.mean((h - 1 / (2 * beta)) ** 2)
    return jnp.stack([dpo, ipo, -jnp.sum(chosen) / jnp.sum(batch.chosen_mask)])


def test_a_step_on_pairs_descends_the_loss_of_its_method(frontier, settings):
    experiment = frontier.Experiment(settings)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 200, (4, 16), dtype=np.int32)
    prompts, chosen, rejected = np.split(tokens, (8, 12), axis=1)
    real, lengths = np.ones((4, 8), bool), np.array([[1, 2, 3, 4], [4, 1, 2, 3]])
    masks = np.arange(4) < lengths[..., None]
    arrays = prompts, real, chosen, masks[0], rejected, masks[1], np.zeros(4, np.float32)
    references = rng.normal(-22.0, 1.0, (2, 4)).astype(np.float32)
    batch, beta = PairBatch(*arrays, real[:, 0], *references), np.float32(0.3)
    reference = jax.grad(lambda params, w: w @ losses(experiment.model, params, batch, beta))
    reference = jax.jit(reference)
    for weights in np.eye(3, dtype=np.float32):
        gradients = reference(experiment.params, weights)
        state = init_train_state(experiment.copied_params(), experiment.dpo_optimizer)
        stepped = experiment.pair_step(state, batch, weights, beta).params
        trees = experiment.params, stepped, gradients
        for before, after, gradient in zip(*map(jax.tree.leaves, map(jax.device_get, trees))):
            expected = RATE * gradient / (np.abs(gradient) + 1.0)  # Adam's first step
            np.testing.assert_allclose(before - after, expected, rtol=1e-3, atol=1e-5)


def test_the_table_has_the_largest_gold_score_within_each_kl(frontier):
    report = frontier.report
    points = [
        report.Point("dpo", 0.1, seed, step, kl, gold, 0.0)
        for seed, step, kl, gold in (
            (0, 1, 0.5, 0.2), (0, 2, 3.0, 0.6), (1, 1, 0.9, 0.4), (1, 2, 1.8, 0.3)
        )
    ]  # fmt: skip
    table = report.table_of_frontiers(points, (0.1, 1.0, 4.0)).splitlines()
    assert table[-1] == "| DPO | - | 0.30 ± 0.14 | 0.50 ± 0.14 |"
    last = report.table_of_last_steps(points).splitlines()
    assert last[-1] == "| DPO | beta 0.1 | 2.40 ± 0.85 | 0.45 ± 0.21 |"
    means = report.means_over_seeds(points)
    assert [(x.kl, x.gold) for x in means] == [
        pytest.approx((0.7, 0.3)),
        pytest.approx((2.4, 0.45)),
    ]
