"""Responses of several turns: the policy samples, an environment replies, the policy goes on.

An environment is a function f(prompts, transcripts, **columns) of lists of texts. It gives for each
transcript, all that stands behind the prompt, a text that is appended to it, or None where the
response ends. It is called when the policy has ended its turn, with EOS, a stop string or the limit
of a turn. The first turns of all responses to a prompt share one pass over it; later ones read the
prompt and the transcript again.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from rlhf_jax.batches import PromptBatch, Rollout, TurnRollout
from rlhf_jax.errors import InputError, shown
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.rollout.generation import generate
from rlhf_jax.runtime.evaluation.policies import columns_of
from rlhf_jax.runtime.rewards.functions import call_function
from rlhf_jax.runtime.rewards.texts import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRANSCRIPTS = ("prompts", "transcripts")  # the arguments of an environment
Environment = Callable[..., list[str | None]]


@dataclasses.dataclass
class _Response:
    """A response on its way: tokens, whether the policy sampled each, and its log-probability."""

    tokens: list[int]
    acted: list[bool]
    logprobs: list[float]
    is_running: bool

    def add(self, tokens: Sequence[int], acted: bool, logprobs: Sequence[float]) -> None:
        self.tokens += tokens
        self.acted += [acted] * len(tokens)
        self.logprobs += logprobs


class TurnSampler:
    """Samples responses of several turns, as (source, batch, key) -> TurnRollout.

    Args:
      settings: with the fields of `SamplingSettings` and `TurnSettings`.
      environment: replies to transcripts.
      examples: all of them; the environment gets the other columns of those in a batch.
      params_of: the policy's parameters in a source, such as a state.
      compiled: a pure (source, (batch, limits), key) -> Rollout as a program.
      sharding: of a batch on the devices.
      num_responses: K; None is one response, without an axis for it.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        settings: Any,
        environment: Environment,
        examples: list[dict[str, Any]],
        *,
        params_of: Callable[[Any], Params],
        compiled: Callable[[Callable[..., Rollout]], Any],
        sharding: NamedSharding,
        num_responses: int | None = None,
    ) -> None:
        self.tokenizer, self.settings, self.environment = tokenizer, settings, environment
        self.examples, self._sharding, self._num_responses = examples, sharding, num_responses

        def turn(num_responses, source, inputs, key):
            batch, limits = inputs
            return generate(
                model,
                params_of(source),
                batch.prompts,
                batch.prompt_mask,
                key,
                max_new_tokens=settings.longest_turn,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                stop_token_ids=model.stop_token_ids,
                max_lengths=limits,
                num_responses=num_responses,
            )

        self._first = compiled(lambda *args: turn(num_responses, *args))
        self._next = compiled(lambda *args: turn(None, *args))

    def programs(self, source: Any, batch: PromptBatch, key: jax.Array) -> tuple[list[Any], Any]:
        """(the largest program with its arguments, the shapes of a rollout)."""
        shape: tuple[int, ...] = batch.prompts.shape[:1]
        shape += () if self._num_responses is None else (self._num_responses,)
        width = batch.prompts.shape[1] + self.settings.response_length - 1
        count = int(np.prod(shape))

        def array(dtype, *sizes):
            return jax.ShapeDtypeStruct(sizes, dtype)

        indices = array("int32", count)
        later = PromptBatch(array("int32", count, width), array(bool, count, width), indices)
        length = self.settings.response_length
        parts = [array(dtype, *shape, length) for dtype in ("int32", bool, "float32", bool)]
        return [(self._next, (source, (later, indices), key))], TurnRollout(*parts)

    def __call__(self, source: Any, batch: PromptBatch, key: jax.Array) -> TurnRollout:
        """The rollout on the devices; turn t is sampled with `fold_in(key, t)`."""
        count, length = self._num_responses or 1, self.settings.response_length
        sampled = self._first(source, (PromptBatch(*batch[:3]), None), jax.random.fold_in(key, 0))
        prompts, prompt_mask, indices = (
            np.repeat(part, count, axis=0) for part in hosts.to_host(tuple(batch[:3]))
        )
        texts = decode(self.tokenizer, prompts, prompt_mask)
        responses = [_Response([], [], [], bool(mask.any())) for mask in prompt_mask]
        for turn in range(self.settings.max_turns):
            if turn:
                inputs = self._later(responses, prompts, prompt_mask, indices)
                turn_key = jax.random.fold_in(key, turn)
                sampled = self._next(source, hosts.from_host(inputs, self._sharding), turn_key)
            self._append(responses, sampled)
            if turn + 1 < self.settings.max_turns:
                self._reply(responses, texts, indices)
            if not any(each.is_running for each in responses):
                break
        shape: tuple[int, ...] = batch.prompts.shape[:1]
        shape += () if self._num_responses is None else (count,)
        return hosts.from_host(_arrays(responses, (*shape, length)), self._sharding)

    def _append(self, responses: list[_Response], sampled: Rollout) -> None:
        """Adds a turn to the responses that are on their way, up to a stop string in it."""
        parts = hosts.to_host(tuple(sampled[:3]))
        arrays = (x.reshape(-1, x.shape[-1]) for x in parts)
        for response, tokens, mask, logprobs in zip(responses, *arrays, strict=True):
            if response.is_running:
                ids = tokens[mask].tolist()
                size = self._turn_length(ids)
                response.add(ids[:size], True, logprobs[mask].tolist()[:size])

    def _turn_length(self, ids: list[int]) -> int:
        """The number of tokens up to the end of the first stop string."""

        def has_stop(size: int) -> bool:
            text = self.tokenizer.decode(ids[:size], skip_special_tokens=True)
            return any(stop in text for stop in self.settings.stop_strings)

        return min(len(ids), bisect.bisect_left(range(len(ids) + 1), True, key=has_stop))

    def _reply(self, responses: list[_Response], prompts: list[str], indices: Any) -> None:
        """Appends the replies; where there is none, or no room after it, the response ends."""
        limit = self.settings.response_length
        for response in responses:
            response.is_running &= len(response.tokens) < limit
        running = [n for n, response in enumerate(responses) if response.is_running]
        if not running:
            return
        transcripts = self.tokenizer.batch_decode(
            [responses[n].tokens for n in running],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        texts = ([prompts[n] for n in running], transcripts)
        columns = columns_of(self.examples, indices[running])
        replies = hosts.from_first(_replies, self.environment, *texts, columns)
        for number, reply in zip(running, replies, strict=True):
            response = responses[number]
            if reply is not None:
                room = limit - len(response.tokens)
                ids = self.tokenizer.encode(reply, add_special_tokens=False)[:room]
                response.add(ids, False, [0.0] * len(ids))
            response.is_running = reply is not None and len(response.tokens) < limit

    def _later(
        self, responses: list[_Response], prompts: Any, prompt_mask: Any, indices: Any
    ) -> tuple[PromptBatch, Any]:
        """Prompts with transcripts, left-padded, and the limit of each turn."""
        length = self.settings.response_length
        width = prompts.shape[1] + length - 1
        tokens = np.zeros((len(responses), width), np.int32)
        mask, limits = np.zeros(tokens.shape, bool), np.zeros(len(responses), np.int32)
        for n, response in enumerate(responses):
            if response.is_running:
                ids = [*prompts[n][prompt_mask[n]], *response.tokens]
                tokens[n, width - len(ids) :], mask[n, width - len(ids) :] = ids, True
                limits[n] = min(self.settings.longest_turn, length - len(response.tokens))
        return PromptBatch(tokens, mask, np.asarray(indices)), limits  # type: ignore[arg-type]


def _arrays(responses: list[_Response], shape: tuple[int, ...]) -> TurnRollout:
    """The responses as NumPy arrays of a shape [B, T] or [B, K, T]."""
    dtypes = (np.int32, bool, np.float32, bool)
    arrays: list[Any] = [np.zeros((len(responses), shape[-1]), dtype) for dtype in dtypes]
    for n, each in enumerate(responses):
        size = len(each.tokens)
        columns = (each.tokens, True, each.logprobs, each.acted)
        for array, values in zip(arrays, columns, strict=True):
            array[n, :size] = values
    return TurnRollout(*(array.reshape(shape) for array in arrays))


def _replies(
    environment: Environment, prompts: list[str], transcripts: list[str], columns: dict[str, Any]
) -> list[str | None]:
    """environment(prompts, transcripts, **columns), checked: a text or None for each transcript."""
    name = getattr(environment, "__name__", "the environment")
    replies = call_function(
        environment,
        name,
        (prompts, transcripts),
        columns,
        nouns=("replies", "transcripts"),
        expected="a list of texts, or None where a response ends, one for each transcript",
    )
    for index, reply in enumerate(replies):
        if not isinstance(reply, str | None):
            raise InputError(
                f"{name} gave {shown(reply)} at index {index}; it has to give a text, or None "
                "where the response ends."
            )
    return replies
