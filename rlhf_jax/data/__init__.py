"""Text in, batches of NumPy arrays out: tokenizers, data sets, encoding, and the order of batches.

Names are imported when they are first used; none of them needs jax. transformers, tokenizers and
datasets are imported by the functions that use them.
"""

from typing import TYPE_CHECKING

from rlhf_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_jax.data.batching import Batches as Batches
    from rlhf_jax.data.batching import eval_batches as eval_batches
    from rlhf_jax.data.comparisons import encode_pairs as encode_pairs
    from rlhf_jax.data.comparisons import encode_rankings as encode_rankings
    from rlhf_jax.data.datasets import load_examples as load_examples
    from rlhf_jax.data.kinds import encode_examples as encode_examples
    from rlhf_jax.data.prompts import encode_prompts as encode_prompts
    from rlhf_jax.data.settings import DataSettings as DataSettings
    from rlhf_jax.data.settings import TokenizerSettings as TokenizerSettings
    from rlhf_jax.data.sft import encode_texts as encode_texts
    from rlhf_jax.data.sft import tokenize_texts as tokenize_texts
    from rlhf_jax.data.tokenizers import load_tokenizer as load_tokenizer
    from rlhf_jax.data.tokenizers import train_tokenizer as train_tokenizer

__getattr__, __dir__, __all__ = lazy_names(__name__)
