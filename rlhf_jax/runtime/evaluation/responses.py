"""Text in, text out: responses of a trained model to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

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
    model: Model, settings: GenerationSettings
) -> Callable[[Params, PromptBatch, jax.Array], Rollout]:
    """A pure (params, batch, key) -> Rollout that samples by the section `generation`."""

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
        )

    return sample


class Responder:
    """Responses of a model to texts; one compiled program for all batches of a call.

    Prompts that are too long are cut before the `prompt_suffix` of the section `data`.

    Raises:
      InputError: the response alone would fill all positions of the model.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        settings: GenerationSettings,
        prompt_suffix: str | None = None,
    ) -> None:
        max_prompt_length = model.config.n_positions - settings.max_new_tokens
        if max_prompt_length < 1:
            raise InputError(
                f"generation.max_new_tokens = {settings.max_new_tokens} leaves no room for a "
                f"prompt in the model's n_positions = {model.config.n_positions}; shorten it."
            )
        self.tokenizer, self.batch_size = tokenizer, settings.batch_size
        self.data = DataSettings(max_prompt_length=max_prompt_length, prompt_suffix=prompt_suffix)
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
