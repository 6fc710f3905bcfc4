"""Prompts that a model solves in a part of its responses: `rlhf filter`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.data.datasets import load_examples
from rlhf_jax.data.examples import source_of
from rlhf_jax.errors import InputError
from rlhf_jax.runtime.config import FilterConfig, resolve
from rlhf_jax.runtime.sampling.pairs import (
    find_rewards,
    sampled_groups,
    samples_file,
    write_output,
)


def run_filter(config: FilterConfig | str | os.PathLike | Mapping[str, Any]) -> int:
    """Samples responses to each prompt, scores them, and writes the prompts solved in part.

    A response passes where its score is at least `pass_threshold`; the pass rate of a prompt is the
    share of its responses that pass. The output has the columns of the data and `pass_rate`. The
    responses are in a file beside it, from which the same command continues after an interruption.

    Returns:
      The number of prompts that are left.

    Raises:
      InputError: there is no model, no reward or no prompt left, or the output cannot be written.
    """
    config = resolve(FilterConfig, config)
    groups = sampled_groups(config, find_rewards(config, "filter"))
    examples, _ = load_examples(config.data, "prompts", quiet=True)
    rates = [np.mean([e["score"] >= config.pass_threshold for e in group]) for group in groups]
    kept = [
        {**_columns(example), "pass_rate": float(rate)}
        for example, rate in zip(examples, rates, strict=True)
        if config.min_pass_rate <= rate <= config.max_pass_rate
    ]
    print(_summary(rates, kept, config), file=sys.stderr)
    if not kept:
        raise InputError(
            f"No prompt is left: the pass rates of the {len(rates)} prompts are from "
            f"{min(rates):.2f} to {max(rates):.2f}, their mean is {np.mean(rates):.2f}; the "
            f"responses are in {samples_file(config)}."
        )
    write_output(config, kept)
    return len(kept)


def _columns(example: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the data, and the prompt where it was derived from another one."""
    return {
        **{name: example[name] for name in ("prompt",) if name in example},
        **source_of(example),
    }


def _summary(rates: list[Any], kept: list[Any], config: FilterConfig) -> str:
    low, high = config.min_pass_rate, config.max_pass_rate
    return (
        f"{len(kept)} of {len(rates)} prompts have a pass rate from {low:g} to {high:g}, "
        f"{sum(rate < low for rate in rates)} a lower and {sum(rate > high for rate in rates)} a "
        f"higher one; the mean of all is {np.mean(rates):.3f}"
    )
