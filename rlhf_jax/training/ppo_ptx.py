"""PPO-ptx: texts that the policy is not to forget, mixed into its updates (InstructGPT)."""

import jax
import jax.numpy as jnp

from rlhf_jax.batches import TextBatch
from rlhf_jax.functional import cross_entropy_loss
from rlhf_jax.models.interface import Model, Params, positions_from
from rlhf_jax.training.frozen import full_params
from rlhf_jax.training.ppo_settings import Settings
from rlhf_jax.training.sft import predictions

# `split(key, n)` may be the folding in of 0 to n - 1: this number is none of them.
_TEXTS = 2**31 - 1


def text_minibatches(
    settings: Settings, texts: TextBatch | None, key: jax.Array
) -> TextBatch | None:
    """The texts of each update of an iteration, TextBatch [epochs * minibatches, rows, L].

    Each epoch has its own permutation of them, as it has of the responses. None, whatever is
    given, where `ptx_coef` is 0.

    Args:
      texts: of the iteration, `settings.num_texts` rows.
      key: of the iteration's updates; what is drawn here is drawn from no other part of it.

    Raises:
      ValueError: there are no texts, or another number of rows of them.
    """
    if not settings.ptx_coef:
        return None
    rows, epochs = settings.num_texts, settings.num_ppo_epochs
    if texts is None:
        raise ValueError(
            f"ppo.ptx_coef is {settings.ptx_coef}, but the batch has no texts: put a TextBatch "
            "into PromptBatch.texts, or set ppo.ptx_coef to 0."
        )
    given = texts.tokens.shape[0]
    if given != rows:
        raise ValueError(f"the batch has {given} rows of texts, but ppo.ptx_batch_size is {rows}.")
    keys = jax.random.split(jax.random.fold_in(key, _TEXTS), epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, rows))(keys)
    order = order.reshape(epochs * settings.num_mini_batches, -1)
    return jax.tree.map(lambda x: x[order], texts)


def with_ptx(
    settings: Settings,
    model: Model,
    params: Params,
    texts: TextBatch | None,
    loss: jax.Array,
    metrics: dict[str, jax.Array],
    *,
    trunk: Params | None = None,
    denominator: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss + ptx_coef * the loss of a minibatch's texts, metrics with `loss/ptx_avg`).

    Both are as they were where `ptx_coef` is 0. `params` are the whole policy's, or its trained
    half above the frozen `trunk`; the denominator is that of `text_loss`.
    """
    if not settings.ptx_coef or texts is None:
        return loss, metrics
    ptx_loss = text_loss(model, params, texts, trunk=trunk, denominator=denominator)
    return loss + settings.ptx_coef * ptx_loss, {**metrics, "loss/ptx_avg": ptx_loss}


def count_text_tokens(texts: TextBatch) -> jax.Array:
    """f32[]: the tokens that `text_loss` is a mean over."""
    return jnp.sum(texts.loss_mask[:, 1:], dtype=jnp.float32)


def text_loss(
    model: Model,
    params: Params,
    texts: TextBatch,
    *,
    trunk: Params | None = None,
    denominator: jax.Array | None = None,
) -> jax.Array:
    """f32[]: cross entropy of the texts in nats, a mean over the tokens that their loss mask has.

        -E_{x ~ pretraining} [log pi(x)]

    At temperature 1 whatever responses are sampled at, and without dropout. 0 if no token counts.
    With a denominator it is the sum over that, for a part of a larger batch.

    Ouyang et al., InstructGPT, eq. 2 (arXiv:2203.02155), where log pi(x) is that of a whole text
    and the mean one over texts; here each token counts the same, so that the coefficient does not
    depend on the length of the rows, nor on what is packed into one.
    """
    hidden = _text_hidden(model, params, texts, trunk)
    states, targets, mask = predictions(texts, hidden)
    logits = model.padded_logits(full_params(model, trunk, params), states)
    return cross_entropy_loss(logits, targets, mask, denominator=denominator)[0]


def _text_hidden(model, params, texts, trunk):
    """[B, L, D] of the texts; nothing goes back through a frozen trunk, a stack of its own."""
    if trunk is None:
        return model.hidden(params, texts.tokens, texts.segments)
    positions = positions_from(texts.segments)
    x = model.embed(trunk, texts.tokens, positions)
    for stack in (trunk["layers"], params["layers"]):
        x, _ = model.layers(stack, x, texts.segments, positions)
    return model.final(params, x)
