"""Preference pairs of a model's own responses: `rlhf pairs sample`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.prompts import encode_prompts
from rlhf_jax.errors import InputError
from rlhf_jax.parallel.mesh import make_mesh
from rlhf_jax.parallel.partition import check_batch_size
from rlhf_jax.runtime import loading
from rlhf_jax.runtime.config import PairsConfig, ScoredSamplingConfig, resolve
from rlhf_jax.runtime.rewards.scorers import NamedSource, find_sources, load_rewards
from rlhf_jax.runtime.run.folder import disk_errors, encode_line, replace_file
from rlhf_jax.runtime.sampling.samples import (
    SampledSet,
    ScoredSampler,
    check_functions,
    check_sampled_positions,
    check_sources,
    mark_of,
)
from rlhf_jax.runtime.sampling.selection import Groups, pairs_of


def run_pairs(config: PairsConfig | str | os.PathLike | Mapping[str, Any]) -> int:
    """Samples responses to each prompt, scores them, and writes the best and the worst as a pair.

    The responses are in a file beside `output`, from which the same command continues after an
    interruption: of pairs.jsonl that is pairs.samples.jsonl.

    Returns:
      The number of pairs.

    Raises:
      InputError: there is no model, no reward or no pair, or the output cannot be written.
    """
    config = resolve(PairsConfig, config)
    groups = sampled_groups(config, find_rewards(config, "pairs sample"))
    pairs, num_dropped = pairs_of(groups, config.keep_truncated)
    if not pairs:
        raise InputError(
            f"No pair is left: the responses to each of the {len(groups)} prompts have one score, "
            f"or fewer than two can be used; their scores are in {samples_file(config)}."
        )
    write_output(config, pairs)
    if num_dropped:
        reason = "their responses have one score, or fewer than two can be used"
        print(f"{num_dropped} of {len(groups)} prompts have no pair: {reason}", file=sys.stderr)
    return len(pairs)


def find_rewards(config: ScoredSamplingConfig, command: str) -> list[NamedSource]:
    """The rewards; an InputError if there is none, no model, or the output is no JSONL file."""
    if config.model.path is None:
        raise InputError(f"{command} needs a model: give --model.path a folder or hub name.")
    if not config.output.endswith(".jsonl"):
        raise InputError(f"output is {config.output}: give it a name that ends with .jsonl.")
    sources = find_sources(config.model.reward_path, config.rewards)
    check_sources(sources, command)
    return sources


def samples_file(config: ScoredSamplingConfig) -> epath.Path:
    """Beside the output: of a.jsonl, a.samples.jsonl."""
    return epath.Path(config.output).with_suffix(".samples.jsonl")


def write_output(config: ScoredSamplingConfig, entries: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the output by these entries, a line each."""
    with disk_errors(config.output, "give --output a file that can be written"):
        replace_file(config.output, b"".join(map(encode_line, entries)))


def sampled_groups(config: ScoredSamplingConfig, sources: Sequence[NamedSource]) -> Groups:
    """The responses to each prompt, in the order of the training examples."""
    mesh, generation = make_mesh(config.mesh), config.generation
    check_batch_size(mesh, "generation.batch_size", generation.batch_size)
    examples, _ = load_examples(config.data, "prompts")
    check_functions(sources, examples)
    tokenizer = loading.choose_tokenizer(config.tokenizer, config.model.path, list)
    with jax.set_mesh(mesh):
        key = jax.random.key(config.seed)
        model, params = loading.load_model(config.model, tokenizer, key, mesh)
        room = model.config.n_positions - generation.max_new_tokens
        length = max(1, min(room, config.data.max_prompt_length))
        check_sampled_positions(model, length, generation)
        rewards, reward_params = load_rewards(sources, config.model, tokenizer, mesh)
        for scorer in rewards.token_models:
            check_sampled_positions(scorer, length, generation, scored=True)
        data = dataclasses.replace(config.data, max_prompt_length=length)
        prompts = encode_prompts(examples, tokenizer, data)
        sampler = ScoredSampler(model, tokenizer, generation, rewards, mesh)
        sampled = SampledSet(samples_file(config), config.num_samples, config.seed)
        dtype = loading.compute_dtype(config.model.dtype)
        mark = mark_of(examples, prompts, sampler, params, reward_params, sources, sampled, dtype)
        arguments = (sampler, params, reward_params, examples, prompts, mark)
        return sampled.completed(*arguments, shown=True)
