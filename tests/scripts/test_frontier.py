"""The script of the reward-KL frontier: pairs, frontiers, tables, and a tiny run."""

import dataclasses
import functools
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.batches import PairBatch, PromptBatch
from rlhf_jax.data.tokenizers import train_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import save_pretrained
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.runtime import config
from rlhf_jax.training import dpo
from tests import small

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["A good film, and a long one.", "A dull film that is far too long."] * 8
CONFIG = {
    "data": {"max_prompt_length": 8, "prompt_tokens": [2, 8], "eval_rows": 8},
    "gold": "tests.scripts.test_frontier:words",
    "frontier": {
        "dpo_beta": [],
        "ipo_beta": [],
        "sft": False,
        "ppo_kl_coef": [0.1],
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
    tokenizer = train_tokenizer(TEXTS, 270)
    shape = GPT2Config(len(tokenizer), 16, 8, 1, 1)
    model = GPT2(shape)
    params = jax.jit(model.init)(jax.random.key(0))
    save_pretrained(folder / "run" / "sft" / "hf", model, params, tokenizer)
    data = {**CONFIG["data"], "path": str(folder / "texts.jsonl")}
    values = {**CONFIG, "data": data, "run_dir": str(folder / "run")}
    return config.resolve(frontier.Config, values)


def test_a_run_adds_what_is_missing_and_draws_it(frontier, settings, capsys):
    frontier.main(settings)
    file = Path(settings.run_dir) / "points.jsonl"
    first = small.rows(file)
    names = [(each["method"], each["step"]) for each in first]
    assert names == [("start", 0), ("ppo", 1), ("ppo", 2)]
    assert first[0]["kl"] == pytest.approx(0.0, abs=1e-3)  # of the fine-tuned model to itself
    assert all(1.0 <= each["gold"] <= 40.0 for each in first)
    more = dataclasses.replace(settings.frontier, ppo_kl_coef=(0.1, 0.2))
    frontier.main(dataclasses.replace(settings, frontier=more))
    rows = small.rows(file)
    assert rows[:3] == first
    assert [each["coefficient"] for each in rows[3:]] == [0.2, 0.2]
    assert "| PPO on the gold score | kl_coef 0.2 |" in capsys.readouterr().out
    assert ET.parse(file.with_name("frontier.svg")).getroot().tag.endswith("svg")
    other = dataclasses.replace(settings, frontier=dataclasses.replace(more, steps=4))
    with pytest.raises(InputError, match="holds points of other settings"):
        frontier.main(other)


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


def test_a_step_on_pairs_is_that_of_the_trainer(frontier):
    """`rlhf dpo` compiles its coefficient; here it is an argument."""
    model = GPT2(GPT2Config(20, 8, 8, 1, 1))
    rng = np.random.default_rng(0)
    tokens, real = rng.integers(0, 20, (3, 4, 3)), np.ones((4, 3), bool)
    sums = rng.normal(-9.0, 1.0, (2, 4)).astype(np.float32)
    valid = np.ones(4, bool)
    batch = PairBatch(
        tokens[0],
        real,
        tokens[1],
        real,
        tokens[2],
        real,
        np.zeros(4, np.float32),
        valid,
        *sums,
    )
    optimizer, settings = optax.sgd(0.1), dpo.Settings(kind="sigmoid", beta=0.3)
    params = jax.jit(model.init)(jax.random.key(0))
    state = dpo.init_state(model, params, settings, jax.random.key(0), optimizer=optimizer)
    step = jax.jit(dpo.make_step(model, settings, optimizer=optimizer))
    expected, _ = step(state, batch, jax.random.key(0))
    step = jax.jit(functools.partial(frontier.pair_step, model, optimizer))
    state = step(state, batch, np.array([1, 0, 0], np.float32), np.float32(0.3))
    for ours, theirs in zip(*map(jax.tree.leaves, (state.params, expected.params))):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


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
    ends = report.table_of_ends(points).splitlines()
    assert ends[-1] == "| DPO | beta 0.1 | 2.40 ± 0.85 | 0.45 ± 0.21 |"
    means = report.means_over_seeds(points)
    assert [(x.kl, x.gold) for x in means] == [
        pytest.approx((0.7, 0.3)),
        pytest.approx((2.4, 0.45)),
    ]
