"""Scored responses to the prompts of a data set, in a file that an interrupted command completes.

A batch of prompts is sampled with a key that depends on the seed and its number alone, and its
lines are appended together. An incomplete batch of an interrupted command is cut.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rlhf_jax.batches import PromptBatch
from rlhf_jax.data.batching import eval_batches
from rlhf_jax.errors import InputError
from rlhf_jax.models.interface import Model, Params
from rlhf_jax.parallel import hosts
from rlhf_jax.rollout.settings import GenerationSettings
from rlhf_jax.runtime.evaluation.policies import columns_of, turns_of
from rlhf_jax.runtime.evaluation.responses import sampler
from rlhf_jax.runtime.loading import check_positions
from rlhf_jax.runtime.program import Placement
from rlhf_jax.runtime.rewards.scorers import NamedSource, Rewards, check_sources_call
from rlhf_jax.runtime.rewards.sources import RewardSource
from rlhf_jax.runtime.rewards.texts import Responses
from rlhf_jax.runtime.run.folder import (
    disk_errors,
    encode_line,
    is_remote,
    read_lines,
    replace_file,
)
from rlhf_jax.runtime.run.progress import Progress
from rlhf_jax.runtime.run.records import digest, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Examples = list[dict[str, Any]]
Mark = dict[str, Any]  # the origin of the responses in a file: values by their names in words


def check_sampled_positions(
    model: Model, max_prompt_length: int, generation: GenerationSettings, scored: bool = False
) -> None:
    """Raises an InputError if a prompt with its response has more tokens than positions."""
    key = "data.max_prompt_length + generation.max_new_tokens"
    key += ", to be scored by the reward model," if scored else ""
    check_positions(model, max_prompt_length + generation.max_new_tokens, key)


class ScoredSampler:
    """Samples responses to batches of prompts, and scores them.

    Args:
      generation: how responses are sampled.
      mesh: of the parameters.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        generation: GenerationSettings,
        rewards: Rewards,
        mesh: Mesh,
    ) -> None:
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.rewards, self._place = rewards, Placement(mesh, model.partition_rules)
        self._samplers: dict[int, Any] = {}

    def __call__(
        self,
        params: Params,
        reward_params: Sequence[Params],
        batch: PromptBatch,
        examples: Examples,
        key: jax.Array,
        num_samples: int = 1,
    ) -> tuple[Responses, np.ndarray]:
        """(responses, f32[N K] scores): those of a prompt follow each other, K = `num_samples`.

        Args:
          batch: NumPy arrays; its padding has no responses.
          examples: all of them; the rewards get the other columns of those in the batch.
        """
        if num_samples not in self._samplers:
            sample = sampler(self.model, self.generation, num_samples)
            self._samplers[num_samples] = self._place.rollout(sample, params)
        on_devices = hosts.from_host(PromptBatch(*batch[:3]), self._place.batch)
        rollout = hosts.to_host(self._samplers[num_samples](params, on_devices, key))
        tokens, mask = (part.reshape(-1, part.shape[-1]) for part in rollout[:2])
        arrays: Any = (np.repeat(array, num_samples, axis=0) for array in batch[:3])
        batch = PromptBatch(*arrays)
        real = np.asarray(batch.prompt_mask).any(axis=1)
        responses = Responses(
            self.tokenizer,
            batch.prompts[real],
            batch.prompt_mask[real],
            [(tokens[real], mask[real])],
            columns_of(examples, batch.indices[real]),
            batch.indices[real],
            self.model.stop_token_ids,
            turns_of(examples, batch.indices[real]),
        )
        scores, _ = self.rewards(reward_params, responses, self.generation.batch_size)
        return responses, scores


@dataclasses.dataclass(frozen=True)
class SampledSet:
    """A data set of K responses to each prompt, in a JSONL file with a mark beside it.

    A line has `prompt`, `completion`, `score`, and `ended`: whether the response has EOS. Prompt
    and completion are messages where the prompts are. Lines are in the order of the prompts, K for
    each. The mark, a file of the same name that ends with .json, names their origin.

    Attributes:
      file: its path, which ends with .jsonl.
      num_samples: K.
      seed: of the keys; batch i is sampled with `fold_in(key(seed), i)`.
    """

    file: epath.Path
    num_samples: int
    seed: int

    def completed(
        self,
        sampler: ScoredSampler,
        params: Params,
        reward_params: Sequence[Params],
        examples: Examples,
        prompts: PromptBatch,
        mark: Mark,
        shown: bool,
    ) -> list[list[dict[str, Any]]]:
        """The lines of each prompt, after the missing ones are sampled; all hosts call this.

        Args:
          prompts: NumPy arrays, of all examples.
          mark: from `mark_of`.
          shown: whether progress is shown.

        Raises:
          InputError: the file cannot be written, is damaged, or has another mark.
        """
        size, key = sampler.generation.batch_size, jax.random.key(self.seed)
        total = math.ceil(len(examples) / size)
        done = hosts.from_first(self._begin, mark, len(examples), size)
        with Progress(total, done, "sampling", shown and done < total) as progress:
            for index, batch in enumerate(eval_batches(prompts, size)):
                if index < done:
                    continue
                batch_key = jax.random.fold_in(key, index)
                parts = sampler(params, reward_params, batch, examples, batch_key, self.num_samples)
                hosts.from_first(self._append, _entries(examples, *parts))
                progress.update(index + 1)
        return self._groups(read_lines(self.file), len(examples))

    def _begin(self, mark: Mark, num_prompts: int, batch_size: int) -> int:
        """The number of complete batches in the file, of which all other lines are cut."""
        mark_file = self.file.with_suffix(".json")
        if not self.file.exists():
            with disk_errors(self.file.parent):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                replace_file(mark_file, json.dumps(mark, indent=1).encode())
            return 0
        self._check_mark(mark_file, mark)
        try:
            entries, all_lines = read_lines(self.file), num_prompts * self.num_samples
        except InputError as error:
            raise InputError(f"{self.file} is damaged; delete it to sample anew.") from error
        done = len(entries) // (batch_size * self.num_samples)
        if len(entries) >= all_lines:
            done = math.ceil(num_prompts / batch_size)
        kept = entries[: min(done * batch_size * self.num_samples, all_lines)]
        content = b"".join(map(encode_line, kept))
        if content != self.file.read_bytes():
            with disk_errors(self.file.parent):
                replace_file(self.file, content)
        return done

    def _check_mark(self, mark_file: epath.Path, mark: Mark) -> None:
        remedy = f"put that back, write to another place, or delete {self.file} to sample anew."
        try:
            content = json.loads(mark_file.read_text())
            saved = {name: content[name] for name in mark}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.file} holds responses, but {mark_file}, with what they were sampled from, "
                f"is missing or damaged; {remedy}"
            ) from error
        for name, value in mark.items():
            if saved[name] != value:
                raise InputError(
                    f"{self.file} holds responses with other settings or models: {name} is "
                    f"{saved[name]} there and {value} here; {remedy}"
                )

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        lines = b"".join(map(encode_line, entries))
        with disk_errors(self.file.parent):
            if is_remote(self.file):  # an object store cannot append
                before = self.file.read_bytes() if self.file.exists() else b""
                self.file.write_bytes(before + lines)
                return
            with open(self.file, "ab") as file:
                file.write(lines)

    def _groups(self, entries: list[dict[str, Any]], number: int) -> list[list[dict[str, Any]]]:
        """The lines of each of a number of prompts."""
        count = self.num_samples
        groups = [entries[i * count : (i + 1) * count] for i in range(number)]
        for group in groups:
            if len(group) < count or any(each["prompt"] != group[0]["prompt"] for each in group):
                raise InputError(
                    f"{self.file} has not {count} lines for each prompt: it was changed; delete it "
                    "to sample anew."
                )
        return groups


def mark_of(
    examples: Examples,
    prompts: PromptBatch,
    sampler: ScoredSampler,
    params: Params,
    reward_params: Sequence[Params],
    sources: Sequence[NamedSource],
    sampled: SampledSet,
    dtype: str,
) -> Mark:
    """The origin of responses and scores; of a function in Python, its name."""
    tokens = [np.asarray(array).tolist() for array in prompts[:2]]
    # The checksum of reward models tells more than their paths.
    rewards = [
        {name: value for name, value in _settings_of(each.source).items() if name != "path"}
        for each in sources
    ]
    vocabulary = sampler.tokenizer.backend_tokenizer.to_str()
    return {
        "the number of prompts": len(examples),
        "the SHA-256 of the prompts": digest([*examples, *tokens]),
        "the checksum of the policy": f"{int(fingerprint(params)):08x}",
        "the SHA-256 of its tokenizer": digest([vocabulary, sampler.tokenizer.chat_template]),
        "the rewards": rewards,
        "the checksum of the reward models": f"{int(fingerprint(tuple(reward_params))):08x}",
        "model.dtype": dtype,
        "the number of responses to a prompt": sampled.num_samples,
        "the seed": sampled.seed,
        **{
            f"generation.{name}": value
            for name, value in dataclasses.asdict(sampler.generation).items()
        },
    }


def _settings_of(source: RewardSource) -> dict[str, Any]:
    """Those that every source has, and those of functions that are not the default."""
    defaults = dataclasses.asdict(RewardSource())
    always = ("function", "weight", "name", "label")
    settings = dataclasses.asdict(source)
    return {n: x for n, x in settings.items() if n in always or x != defaults[n]}


def check_sources(sources: Sequence[NamedSource], title: str, call: str = "") -> None:
    """Raises an InputError if there is no reward.

    Args:
      title: the subject of the message.
      call: how a function is given in Python, for the message.
    """
    if not sources:
        raise InputError(
            f"{title} needs a reward: give --model.reward_path a reward model's folder, or "
            f"--rewards a list of them and of functions{call}."
        )


def check_functions(sources: Sequence[NamedSource], examples: Examples) -> None:
    """Raises an InputError if a reward in Python does not take the columns of the data."""
    check_sources_call(sources, columns_of(examples, [0]))


def _entries(examples: Examples, responses: Responses, scores: np.ndarray) -> list[dict[str, Any]]:
    """The lines of a batch."""
    entries = []
    for number, index in enumerate(np.asarray(responses.indices).tolist()):
        # Examples with `text` have no column for the prompt.
        prompt = examples[index].get("prompt", responses.prompt_texts[number])
        completion: Any = responses.texts[0][number]
        if not isinstance(prompt, str):
            completion = [{"role": "assistant", "content": completion}]
        tools = examples[index].get("tools")
        entries.append(
            {
                "prompt": prompt,
                "completion": completion,
                "score": float(scores[number]),
                "ended": bool(responses.ended[0][number]),
                **({"tools": tools} if tools else {}),
            }
        )
    return entries
