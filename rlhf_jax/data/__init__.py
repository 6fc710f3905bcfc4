"""Text in, batches of NumPy arrays out: tokenizers, data sets, and which row comes when.

Importing this costs no more than jax and NumPy; transformers, tokenizers and datasets are imported
by the functions that need them.
"""

from rlhf_jax.data.batching import Batches, eval_batches
from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.pairs import encode_pairs
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.data.rankings import encode_rankings
from rlhf_jax.data.sft import encode_texts, tokenize_texts
from rlhf_jax.data.tokenizers import load_tokenizer, train_tokenizer

__all__ = [
    "Batches",
    "eval_batches",
    "load_examples",
    "load_tokenizer",
    "encode_pairs",
    "encode_prompts",
    "encode_rankings",
    "encode_texts",
    "tokenize_texts",
    "train_tokenizer",
]
