"""Judged responses for tests: batches from lists of tokens, and the courses of TRL's trainers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from rlhf_jax.batches import PairBatch, UnpairedBatch
from tests.models.tiny_gpt2 import pad

GOLDEN = Path(__file__).parents[1] / "golden"
COURSES = json.loads((GOLDEN / "trl_courses.json").read_text())
# Biases of keys have no gradient but rounding, of which Adam makes steps.
FIRST, ALL = {"rel": 1e-4, "abs": 1e-5}, {"rel": 2e-3, "abs": 1e-4}


def padded(texts, width, left=False, junk=6):
    """(tokens, mask), i32[B, width] and bool[B, width], with junk on the padding."""
    tokens, mask = pad(texts, width, "left" if left else "right", junk)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


def pairs(prompts, chosen, rejected, *, size=None, prompt_width=8, width=10):
    """A `PairBatch`; examples past the pairs, up to `size`, are padding of the batch."""
    size = size or len(prompts)
    empty = [[]] * (size - len(prompts))
    columns = padded([*prompts, *empty], prompt_width, left=True)
    for texts in (chosen, rejected):
        columns += padded([*texts, *empty], width)
    return PairBatch(*columns, jnp.zeros(size), jnp.arange(size) < len(prompts))


def unpaired(prompts, responses, labels, other, *, prompt_width=8, width=10):
    """An `UnpairedBatch` without padding examples."""
    columns = padded(prompts, prompt_width, left=True)
    for texts in (responses, other):
        columns += padded(texts, width)
    return UnpairedBatch(*columns, jnp.asarray(labels), jnp.ones(len(labels), bool))


def course(trainer, model, params, batch, settings):
    """The metrics of six steps of AdamW on one batch, as TRL's trainer takes them."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.0))
    key = jax.random.key(0)
    state = trainer.init_state(model, params, settings, key, optimizer=optimizer)
    if settings.has_reference and settings.precompute_ref:
        fields = jax.jit(trainer.make_reference_step(model, settings))(params, batch)
        batch = batch._replace(**fields)
    step = jax.jit(trainer.make_step(model, settings, optimizer=optimizer))
    lines = []
    for _ in range(6):
        state, metrics = step(state, batch, key)
        lines.append({name: float(x) for name, x in metrics.items()})
    return lines


def assert_is_course_of_trl(lines, name):
    """The first two steps within 1e-4, all of them within 2e-3; losses to TRL's four digits."""
    for number, (line, expected) in enumerate(
        zip(lines, COURSES["courses"][name]["steps"], strict=True)
    ):
        tolerance = FIRST if number < 2 else ALL
        for key, value in expected.items():
            own = line[key if "/" in key else f"train/{key}"]
            if key == "loss":
                assert own == pytest.approx(value, rel=tolerance["rel"], abs=1e-4), (number, key)
            else:
                assert own == pytest.approx(value, **tolerance), (number, key)
