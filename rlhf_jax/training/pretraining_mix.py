"""PPO-ptx: cross entropy of texts in the updates on responses, against forgetting (InstructGPT)."""

import jax
import jax.numpy as jnp

from rlhf_jax.batches import TextBatch
from rlhf_jax.functional import cross_entropy_loss
from rlhf_jax.models.interface import Model
from rlhf_jax.training.ppo_settings import Settings
from rlhf_jax.training.sft import predictions
from rlhf_jax.training.trainable import Trainable, full_params, text_hidden

# `split(key, n)` may fold in the numbers from 0 to n - 1: this one is not among them.
_TEXTS = 2**31 - 1


def text_minibatches(
    settings: Settings, texts: TextBatch | None, key: jax.Array
) -> TextBatch | None:
    """The texts of each update of an iteration, arrays [epochs * minibatches, rows, L].

    Each epoch has its own permutation of them, as it has of the responses. None where `ptx_coef`
    is 0.

    Args:
      texts: of the iteration, `settings.num_texts` rows.
      key: of the iteration's updates; the draws here are independent of their others.

    Raises:
      ValueError: there are no texts, or another number of rows.
    """
    if not settings.ptx_coef:
        return None
    rows, epochs = settings.num_texts, settings.num_ppo_epochs
    if texts is None:
        raise ValueError(
            f"ppo.ptx_coef is {settings.ptx_coef}, but the batch has no texts: put a TextBatch "
            "into PromptBatch.texts, or set ppo.ptx_coef to 0."
        )
    actual = texts.tokens.shape[0]
    if actual != rows:
        raise ValueError(f"the batch has {actual} rows of texts, but ppo.ptx_batch_size is {rows}.")
    keys = jax.random.split(jax.random.fold_in(key, _TEXTS), epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys)
    order = order.reshape(epochs * settings.num_mini_batches, -1)
    return jax.tree.map(lambda x: x[order], texts)


def count_text_tokens(texts: TextBatch) -> jax.Array:
    """f32[]: the number of tokens that `text_loss` is a mean over."""
    return jnp.sum(texts.loss_mask[:, 1:], dtype=jnp.float32)


def text_loss(
    model: Model,
    params: Trainable,
    texts: TextBatch,
    *,
    denominator: jax.Array | None = None,
) -> jax.Array:
    """f32[]: cross entropy of the texts in nats, a mean over the tokens of their loss mask.

        -E_{x ~ pretraining} [log pi(x)]

    At temperature 1 whatever the sampling temperature, and without dropout. 0 if no token counts.
    With a denominator it is the sum over that, for a part of a larger batch.

    Ouyang et al., InstructGPT, eq. 2 (arXiv:2203.02155), where log pi(x) is that of a full text
    and the mean one over texts; here every token has the same weight, so that the coefficient
    depends neither on the length of the rows nor on packing.
    """
    hidden = text_hidden(model, params, texts.tokens, texts.segments)
    states, targets, mask = predictions(texts, hidden)
    logits = model.padded_logits(full_params(model, params), states)
    return cross_entropy_loss(logits, targets, mask, denominator=denominator)[0]
