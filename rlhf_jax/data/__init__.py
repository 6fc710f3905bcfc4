"""Text in, batches of NumPy arrays out: tokenizers, data sets, and which row comes when.

Importing this costs no more than jax and NumPy; transformers, tokenizers and datasets are imported
by the functions that need them.
"""

from rlhf_jax.data.batching import Batches, eval_batches
from rlhf_jax.data.datasets import load_rows
from rlhf_jax.data.pairs import pair_rows
from rlhf_jax.data.prompts import prompt_rows
from rlhf_jax.data.rankings import ranking_rows
from rlhf_jax.data.sft import text_rows, tokenize_texts
from rlhf_jax.data.tokenizers import load_tokenizer, train_tokenizer

__all__ = [
    "Batches",
    "eval_batches",
    "load_rows",
    "load_tokenizer",
    "pair_rows",
    "prompt_rows",
    "ranking_rows",
    "text_rows",
    "tokenize_texts",
    "train_tokenizer",
]
