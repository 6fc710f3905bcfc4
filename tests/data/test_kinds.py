"""One entry for all kinds of examples."""

from typing import get_args

import numpy as np
import pytest

from rlhf_jax import batches
from rlhf_jax.data import encode_examples, load_examples
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.kinds import ENCODERS
from rlhf_jax.data.settings import DataSettings

BATCHES = {
    "text": batches.TextBatch,
    "unpaired": batches.UnpairedBatch,
    "pairs": batches.PairBatch,
    "rankings": batches.RankingBatch,
    "prompts": batches.PromptBatch,
    "references": batches.PromptBatch,
}


def test_every_kind_has_an_encoder():
    assert set(ENCODERS) == set(get_args(Kind)) == set(BATCHES)


@pytest.mark.parametrize("kind", BATCHES)
def test_examples_of_a_kind_become_its_batch(tokenizer, kind):
    settings = DataSettings(builtin_rows=6, eval_rows=0, packing=False)
    batch = encode_examples(kind, load_examples(settings, kind)[0], tokenizer, settings)
    assert type(batch) is BATCHES[kind]
    size = 12 if kind == "unpaired" else 6  # a pair makes two examples
    assert all(len(array) == size for array in batch if isinstance(array, np.ndarray))
