"""Language models on held-out texts, each token predicted after the true ones: loss and ROUGE."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from rlhf_jax.functional.linear import positions_per_chunk
from rlhf_jax.models.interface import Model, Params, SharedPrompt
from rlhf_jax.parallel import hosts
from rlhf_jax.runtime.evaluation.rouge import rouge_scores
from rlhf_jax.runtime.rewards.texts import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 64  # positions with logits in memory at a time, fewer where these take over 128 MiB


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def sum_metrics(parts: Iterable[Mapping[str, jax.Array]]) -> dict[str, float]:
    """The sums of the metrics of several batches."""
    sums: dict[str, float] = {}
    for part in hosts.to_host(list(parts)):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def have_completions(examples: Sequence[Mapping[str, Any]], settings: DataSettings) -> bool:
    """Whether the examples have completions, against which ROUGE is computed."""
    return "completion" in examples[0] or ("messages" in examples[0] and settings.completion_only)


def encode_completions(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    settings: DataSettings,
) -> TextBatch:
    """The examples as a batch without packing, in which the completions alone are targets."""
    unpacked = dataclasses.replace(settings, packing=False, completion_only=True)
    logger = logging.getLogger("rlhf_jax.data")
    logger.disabled = True  # the encoding for the loss has warned of the same cuts
    try:
        return encode_texts(examples, tokenizer, unpacked)
    finally:
        logger.disabled = False


class TeacherForcedRouge:
    """ROUGE of the likeliest next tokens against the completions, on the same texts at each call.

    Each token is predicted after the true ones before it, so that this is far higher than the ROUGE
    of responses that the model samples.

    Args:
      texts: as from `encode_completions`.
      batch_size: texts at a time; one compiled program for all of them.
      batch_sharding: of a batch on the mesh of the parameters, if they are on one.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        texts: TextBatch,
        *,
        batch_size: int,
        batch_sharding: NamedSharding | None = None,
    ) -> None:
        self.tokenizer, self.texts, self.batch_size = tokenizer, texts, batch_size
        self.batch_sharding = batch_sharding
        self._predict = jax.jit(make_predict_step(model))
        self.references = decode(tokenizer, texts.tokens, texts.loss_mask)

    def __call__(self, params: Params) -> dict[str, float]:
        """`rouge1`, `rouge2`, `rougeL` and `rougeLsum`."""
        parts = []
        for batch in eval_batches(self.texts, self.batch_size):
            if self.batch_sharding is not None:
                batch = hosts.put(batch, self.batch_sharding)
            parts.append(self._predict(params, batch)[0])
        predicted = np.concatenate(hosts.to_host(parts))[: len(self.references)]
        # The prediction of position t is of the token at t + 1; that at 0 is never a target.
        predictions = decode(self.tokenizer, predicted[:, :-1], self.texts.loss_mask[:, 1:])
        return rouge_scores(predictions, self.references)


def published_metrics(
    model: Model,
    params: Params,
    tokenizer: PreTrainedTokenizerFast,
    texts: TextBatch,
    *,
    max_length: int,
    batch_size: int,
) -> dict[str, float]:
    """Loss and ROUGE by the definition of the published TL;DR results, of `encode_completions`.

    There the labels are all `max_length` ids of a text, including its prompt and its padding, which
    is EOS on the right: the loss is a mean over all positions but the first, and ROUGE compares the
    text of all predictions with that of all labels, without special tokens.

    Returns:
      `loss_published` in nats per position, and `rouge1_published` and so on.

    trlX, examples/summarize_rlhf/sft (train_gptj_summarize.py, summarize_dataset.py).
    """
    padded = pad_texts(texts, max_length, tokenizer.eos_token_id)
    step = jax.jit(make_predict_step(model, runs_padding=True))
    batches = eval_batches(padded, batch_size)
    predicted, nll = zip(*jax.device_get([step(params, batch) for batch in batches]), strict=True)
    tokens, everywhere = padded.tokens, np.ones(padded.tokens.shape, bool)
    both = (np.concatenate(predicted)[: len(tokens)], tokens)
    scores = rouge_scores(*(decode(tokenizer, each, everywhere) for each in both))
    loss = sum(map(float, nll)) / (len(tokens) * (max_length - 1))
    return {"loss_published": loss} | {f"{name}_published": x for name, x in scores.items()}


def pad_texts(texts: TextBatch, length: int, token: int) -> TextBatch:
    """The texts right-padded to a length with a token, in segment 0."""
    padding = [(0, 0), (0, length - texts.tokens.shape[1])]
    tokens, segments, loss_mask = (np.pad(np.asarray(array), padding) for array in texts[:3])
    arrays: tuple[Any, Any, Any] = (np.where(segments > 0, tokens, token), segments, loss_mask)
    return TextBatch(*arrays)


def make_predict_step(
    model: Model, *, runs_padding: bool = False
) -> Callable[[Params, TextBatch], tuple[jax.Array, jax.Array]]:
    """A pure (params, batch) -> (i32[B, L], f32[]).

    The first are the likeliest tokens after each position, the second is the sum of the negative
    log-probabilities of all tokens but the first of each text, in nats. Inert examples that fill up
    a batch add nothing to it. With `runs_padding` padding attends to the real tokens, as in Hugging
    Face's GPT-2.
    """

    def predict(params, batch):
        if runs_padding:
            hidden = _hidden_with_padding(model, params, batch.tokens, batch.segments > 0)
        else:
            hidden = model.hidden(params, batch.tokens, batch.segments)
        likeliest, nll = _read(model, params, hidden, jnp.roll(batch.tokens, -1, axis=1))
        valid = jnp.any(batch.segments > 0, axis=1, keepdims=True)
        return likeliest, jnp.sum(jnp.where(valid, nll[:, :-1], 0.0))

    return predict


def _hidden_with_padding(
    model: Model, params: Params, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """[B, L, D] hidden states, on the padding as in Hugging Face's GPT-2.

    There a padded position attends to all real tokens, and not to itself, and positions go on. Here
    padding attends to nothing; so it is run a second time, over the keys of the real tokens.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    x = model.embed(params, tokens, positions)
    pairs = (x, x), (mask, jnp.zeros_like(mask)), (positions, positions)
    x, mask_of_both, positions = (jnp.concatenate(pair, axis=1) for pair in pairs)
    shared = SharedPrompt(length, 1)
    states, _ = model.layers(params["layers"], x, mask_of_both, positions, shared=shared)
    real, padding = jnp.split(states, 2, axis=1)
    return model.final(params, jnp.where(mask[..., None], real, padding))


def _read(
    model: Model, params: Params, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(likeliest i32[B, T], nll f32[B, T]) of [B, T, D] states, in chunks of positions."""
    batch, length = targets.shape
    size = min(CHUNK, positions_per_chunk(batch, length, model.config.vocab_size))

    def read(position):
        logits = model.logits(params, position[0])
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), -token_logprobs(logits, position[1])

    positions = (jnp.moveaxis(hidden, 1, 0), targets.T)
    likeliest, nll = jax.lax.map(read, positions, batch_size=size)
    return likeliest.T, nll.T
