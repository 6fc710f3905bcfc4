"""The likeliest next tokens, each after the true ones: ROUGE on completions, and as published."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from rlhf_jax.batches import TextBatch
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.sft import encode_texts
from rlhf_jax.functional import token_logprobs
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.evaluation.responses import decode
from rlhf_jax.runtime.evaluation.rouge import rouge_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 64  # positions whose logits are there at a time


def have_completions(rows: Sequence[Mapping[str, Any]], settings: DataSettings) -> bool:
    """Whether the rows have completions that ROUGE can be taken of."""
    messages = "messages" in rows[0] and settings.completion_only
    return "completion" in rows[0] or messages


def encode_completions(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast, settings: DataSettings
) -> TextBatch:
    """The rows as a batch with one text to a row, of which the completion alone is predicted."""
    with _said_before():
        each = dataclasses.replace(settings, packing=False, completion_only=True)
        return encode_texts(rows, tokenizer, each)


@contextlib.contextmanager
def _said_before() -> Iterator[None]:
    """What is cut or dropped was counted and logged when the loss's rows were made of the same."""
    logger = logging.getLogger("rlhf_jax.data")
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


class TeacherForcedRouge:
    """ROUGE of the likeliest next tokens against the completions, on the same rows each time.

    Each token is predicted after the true ones before it, so that this is no measure of what the
    model writes by itself, and is much higher.

    Args:
      rows: as `encode_completions` makes them.
      batch_size: rows at a time; one compiled program for all of them.
      place: where a batch goes on the mesh of the parameters, if they are on one.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        rows: TextBatch,
        *,
        batch_size: int,
        place: NamedSharding | None = None,
    ) -> None:
        self.tokenizer, self.rows, self.batch_size, self.place = tokenizer, rows, batch_size, place
        self._predict = jax.jit(make_completion_step(model))
        self.references = decode(tokenizer, rows.tokens, rows.loss_mask)

    def __call__(self, params: Params) -> dict[str, float]:
        """`rouge1`, `rouge2`, `rougeL` and `rougeLsum`."""
        parts = []
        for batch in eval_batches(self.rows, self.batch_size):
            placed = batch if self.place is None else hosts.put(batch, self.place)
            parts.append(self._predict(params, placed))
        predicted = np.concatenate(hosts.to_host(parts))[: len(self.references)]
        predictions = decode(self.tokenizer, predicted, self.rows.loss_mask)
        return rouge_scores(predictions, self.references)


def published_metrics(
    model: Model,
    params: Params,
    tokenizer: PreTrainedTokenizerFast,
    rows: TextBatch,
    *,
    max_length: int,
    batch_size: int,
) -> dict[str, float]:
    """Loss and ROUGE as the published TL;DR results count them.

    There the labels are all `max_length` ids of a row, the prompt's and the padding's included,
    padded with EOS on the right: the loss is a mean over all positions but the first, and ROUGE
    compares the text of all predictions with that of all labels, without special tokens.

    Args:
      rows: as `encode_completions` makes them.

    Returns:
      `loss_published` in nats per position, and `rouge1_published`, `rouge2_published`,
      `rougeL_published` and `rougeLsum_published`.

    trlX, examples/summarize_rlhf/sft (train_gptj_summarize.py, summarize_dataset.py).
    """
    padded = pad_rows(rows, max_length, tokenizer.eos_token_id)
    step = jax.jit(make_published_step(model))
    parts = jax.device_get([step(params, batch) for batch in eval_batches(padded, batch_size)])
    count = len(padded.tokens)
    predicted = np.concatenate([tokens for tokens, _ in parts])[:count]
    loss = sum(float(nll) for _, nll in parts) / (count * (max_length - 1))
    everywhere = np.ones(padded.tokens.shape, bool)
    texts = (decode(tokenizer, tokens, everywhere) for tokens in (predicted, padded.tokens))
    scores = {f"{name}_published": value for name, value in rouge_scores(*texts).items()}
    return {"loss_published": loss, **scores}


def pad_rows(rows: TextBatch, length: int, token: int) -> TextBatch:
    """The rows right-padded to a length with a token, in segment 0."""
    padding = [(0, 0), (0, length - rows.tokens.shape[1])]
    tokens, segments, loss_mask = (np.pad(np.asarray(array), padding) for array in rows[:3])
    arrays: tuple[Any, Any, Any] = (np.where(segments > 0, tokens, token), segments, loss_mask)
    return TextBatch(*arrays)


def make_completion_step(model: Model) -> Callable[[Params, TextBatch], jax.Array]:
    """A pure (params, batch) -> i32[B, L], the likeliest token at each position given those before.

    The first one, which has nothing before it, is 0.
    """

    def predict(params, batch):
        hidden = model.hidden(params, batch.tokens, batch.segments)
        likeliest, _ = _read(model, params, hidden[:, :-1], batch.tokens[:, 1:])
        return jnp.pad(likeliest, ((0, 0), (1, 0)))

    return predict


def make_published_step(
    model: Model,
) -> Callable[[Params, TextBatch], tuple[jax.Array, jax.Array]]:
    """A pure (params, batch) -> (i32[B, L], f32[]) over all positions of right-padded rows.

    The first are the likeliest tokens after each position, not shifted; the second is the sum of
    the negative log-probabilities of all tokens but the first ones, in nats. Rows that only fill up
    a batch add nothing to it.
    """

    def predict(params, batch):
        hidden = _hidden_of_all(model, params, batch.tokens, batch.segments > 0)
        likeliest, nll = _read(model, params, hidden, jnp.roll(batch.tokens, -1, axis=1))
        real = jnp.any(batch.segments > 0, axis=1, keepdims=True)
        return likeliest, jnp.sum(jnp.where(real, nll[:, :-1], 0.0))

    return predict


def _hidden_of_all(model: Model, params: Params, tokens: jax.Array, real: jax.Array) -> jax.Array:
    """[B, L, D] hidden states on the padding as well, as Hugging Face's GPT-2 has them.

    There a padded position attends to all real tokens, and not to itself, and positions count on.
    Here padding sees nothing; so it is run once more, over the keys of the real tokens.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    x = model.embed(params, tokens, positions)
    empty = model.init_cache(batch, length)
    inside, cache = model.layers(params["layers"], x, real, positions, empty)
    nothing = jnp.zeros_like(real)
    behind, _ = model.layers(params["layers"], x, nothing, positions, prefix=cache)
    return model.final(params, jnp.where(real[..., None], inside, behind))


def _read(
    model: Model, params: Params, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(likeliest i32[B, T], nll f32[B, T]) of [B, T, D] states, without logits of all at once."""
    batch, length = targets.shape
    missing = -length % CHUNK
    hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, missing)))

    def read(chunk):
        logits = model.logits(params, chunk[0])
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), -token_logprobs(logits, chunk[1])

    chunks = (
        jnp.moveaxis(hidden.reshape(batch, -1, CHUNK, hidden.shape[-1]), 1, 0),
        jnp.moveaxis(targets.reshape(batch, -1, CHUNK), 1, 0),
    )
    found = jax.lax.map(read, chunks)
    likeliest, nll = (jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in found)
    return likeliest, nll
