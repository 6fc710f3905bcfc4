"""One entry for all kinds of examples: a trainer names its kind, and this encodes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_jax.batches import PairBatch, PromptBatch, RankingBatch, TextBatch, UnpairedBatch
from rlhf_jax.data.comparisons import encode_pairs, encode_rankings, encode_unpaired
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.sft import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AnyBatch = TextBatch | PairBatch | RankingBatch | UnpairedBatch | PromptBatch

ENCODERS: dict[Kind, Callable[..., AnyBatch]] = {
    "text": encode_texts,
    "pairs": encode_pairs,
    "rankings": encode_rankings,
    "unpaired": encode_unpaired,
    "prompts": encode_prompts,
    "references": encode_prompts,
}


def encode_examples(
    kind: Kind,
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> Any:
    """All examples of a kind, as `load_examples` returns them, as one batch of NumPy arrays.

    Returns:
      The result of `encode_texts`, `encode_pairs`, `encode_rankings`, `encode_unpaired` or
      `encode_prompts`; "references" are encoded as prompts.

    Raises:
      InputError: if no example is left, or messages cannot be rendered.
    """
    return ENCODERS[kind](examples, tokenizer, settings)
