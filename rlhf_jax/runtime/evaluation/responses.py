"""Text in, text out: responses of a trained model to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from rlhf_jax.batches import PromptBatch, Rollout
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel.constraints import padded_batch_size
from rlhf_jax.rollout.generation import generate
from rlhf_jax.rollout.settings import GenerationSettings
from rlhf_jax.runtime.rewards.texts import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def sampler(
    model: Model, settings: GenerationSettings, num_responses: int | None = None
) -> Callable[[Params, PromptBatch, jax.Array], Rollout]:
    """A pure (params, batch, key) -> Rollout that samples by the section `generation`.

    Args:
      num_responses: as in `generate`.
    """

    def sample(params, batch, key):
        return generate(
            model,
            params,
            batch.prompts,
            batch.prompt_mask,
            key,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            stop_token_ids=model.stop_token_ids,
            min_new_tokens=settings.min_new_tokens,
            num_responses=num_responses,
        )

    return sample


def token_entries(
    tokenizer: PreTrainedTokenizerFast,
    tokens: Any,
    mask: Any,
    measures: Mapping[str, Any],
    count: int,
) -> list[dict[str, list[Any]]]:
    """{"text": of each token, NAME: a number for each token} of the first responses.

    Args:
      tokens, mask: i32[B, T] and bool[B, T], NumPy arrays.
      measures: f32[B, T] each; those that are None are left out.
    """
    entries = []
    for index in range(min(count, len(tokens))):
        real = mask[index]
        numbers: dict[str, list[Any]] = {
            name: [float(f"{x:.4g}") for x in values[index][real].tolist()]
            for name, values in measures.items()
            if values is not None
        }
        entries.append({"text": token_texts(tokenizer, tokens[index][real].tolist()), **numbers})
    return entries


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text of each token, special ones included; together they are the text of all.

    Of a character in several tokens the last one has the text, and the others have none.
    """

    def decoded(sequences: list[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode(sequences, clean_up_tokenization_spaces=False)

    texts, (full,) = decoded([[each] for each in ids]), decoded([ids])
    if "".join(texts) == full:
        return texts
    texts, done = [], 0
    for text in decoded([ids[:end] for end in range(1, len(ids) + 1)]):
        complete = text.rstrip("\N{REPLACEMENT CHARACTER}")  # of a character that is not complete
        texts.append(complete[done:])
        done = max(done, len(complete))
    if texts:
        texts[-1] += full[done:]
    return texts


class Responder:
    """Responses of a model to texts; one compiled program for all batches of a call.

    Prompts that exceed the positions of the model, or `max_prompt_length`, lose their left end, or
    their right end before `prompt_suffix`.

    Raises:
      InputError: the response alone would fill all positions of the model.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        settings: GenerationSettings,
        prompt_suffix: str | None = None,
        max_prompt_length: int | None = None,
    ) -> None:
        room = model.config.n_positions - settings.max_new_tokens
        if room < 1:
            raise InputError(
                f"generation.max_new_tokens = {settings.max_new_tokens} leaves no room for a "
                f"prompt in the model's n_positions = {model.config.n_positions}; shorten it."
            )
        self.tokenizer, self.batch_size = tokenizer, settings.batch_size
        length = room if max_prompt_length is None else min(room, max_prompt_length)
        self.data = DataSettings(max_prompt_length=length, prompt_suffix=prompt_suffix)
        self._respond = jax.jit(sampler(model, settings))

    def __call__(self, params: Params, prompts: Sequence[str], key: jax.Array) -> list[str]:
        """One response to each prompt, without EOS; long prompts are cut as in PPO."""
        return [text for batch in self.batches(params, prompts, key) for text in batch]

    def batches(
        self, params: Params, prompts: Sequence[str], key: jax.Array
    ) -> Iterator[list[str]]:
        """The responses, batch by batch as they are ready."""
        examples = [{"prompt": prompt} for prompt in prompts]
        encoded = encode_prompts(examples, self.tokenizer, self.data)
        batch_size = min(self.batch_size, padded_batch_size(len(prompts)))
        for index, batch in enumerate(eval_batches(encoded, batch_size)):
            rollout = self._respond(params, batch, jax.random.fold_in(key, index))
            texts = decode(self.tokenizer, rollout.tokens, rollout.mask)
            yield texts[: len(prompts) - index * batch_size]
