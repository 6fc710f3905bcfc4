"""Dynamic sampling: the groups that are kept, by a loop over lists."""

import jax
import numpy as np

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.training import dynamic_sampling, grpo


def drawn_groups(rng, number, batch_size, scores):
    """A round whose prompts have the indices from `number * batch_size` on."""
    indices = number * batch_size + np.arange(batch_size, dtype=np.int32)
    tokens = np.tile(indices[:, None, None], (1, 2, 3))
    mask = np.ones(tokens.shape, bool)
    batch = PromptBatch(indices[:, None], np.ones((batch_size, 1), bool), indices)
    rollout = Rollout(tokens, mask, rng.normal(size=tokens.shape).astype(np.float32))
    return dynamic_sampling.Groups(batch, rollout, scores)


def test_groups_with_spread_come_first_and_are_counted():
    settings = grpo.Settings(
        batch_size=3, num_generations=2, response_length=3, max_sampling_rounds=4
    )
    rng, kept, aside, drawn = np.random.default_rng(0), [], [], None
    add = jax.jit(lambda drawn, new: dynamic_sampling.with_groups(settings, (), drawn, new))
    # Rounds with 0, 1, 1 and 2 groups with spread: one more than the batch holds.
    rounds = [
        [[1, 1], [0, 0], [2, 2]],
        [[1, 1], [0, 1], [2, 2]],
        [[3, 0], [1, 1], [1, 1]],
        [[0, 0], [0, 4], [5, 1]],
    ]
    for number, scores in enumerate(np.array(rounds, np.float32)):
        groups = drawn_groups(rng, number, 3, scores)
        for index, (one, other) in zip(groups.batch.indices, scores, strict=True):
            (kept if one != other else aside).append(int(index))
        if drawn is None:
            drawn = dynamic_sampling.nothing_drawn(groups)
        assert dynamic_sampling.is_unfinished(settings, drawn)
        drawn = add(drawn, groups)
        expected = (kept + aside)[:3]
        assert drawn.groups.batch.indices.tolist() == expected
        assert drawn.groups.rollout.tokens[:, 0, 0].tolist() == expected
        assert int(drawn.num_spread) == min(3, len(kept))
        np.testing.assert_array_equal(
            drawn.groups.scores, np.concatenate(np.array(rounds, np.float32))[expected]
        )
    assert not dynamic_sampling.is_unfinished(settings, drawn)
    metrics = dynamic_sampling.draw_metrics(settings, drawn)
    assert {name.partition("/")[2]: round(float(x), 5) for name, x in metrics.items()} == {
        "rounds": 4,
        "set_aside": round(8 / 12, 5),
        "reward": round(float(np.mean(rounds)), 5),
    }
