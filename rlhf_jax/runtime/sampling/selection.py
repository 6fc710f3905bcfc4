"""Which of several scored responses to a prompt are trained on, and which make a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.chat import contents
from rlhf_jax.data.encoding import warn
from rlhf_jax.errors import InputError

Entry = dict[str, Any]  # `prompt`, `completion`, `score`, `ended`, perhaps `tools`
Groups = Sequence[Sequence[Mapping[str, Any]]]  # the entries of each prompt


def usable(groups: Groups, keep_truncated: bool) -> list[list[Entry]]:
    """The responses of each prompt that can be trained on, without `ended`, in their order.

    Responses that reached the limit of their length without EOS are left out, unless
    `keep_truncated`, and so are those that are empty or equal to an earlier one of their prompt,
    with one counted warning for each of the two groups (Yuan et al., Scaling Relationship on
    Learning Mathematical Reasoning with Large Language Models, arXiv:2308.01825, likewise keep
    distinct responses).
    """
    kept: list[list[Entry]] = []
    num_truncated = num_repeated = 0
    for group in groups:
        distinct: dict[str, Entry] = {}
        for entry in group:
            text = contents(entry["completion"])
            if not (entry["ended"] or keep_truncated):
                num_truncated += 1
            elif not text.strip() or text in distinct:
                num_repeated += 1
            else:
                distinct[text] = {name: x for name, x in entry.items() if name != "ended"}
        kept.append(list(distinct.values()))
    total = sum(map(len, groups))
    reason = "they reached generation.max_new_tokens without EOS."
    warn(num_truncated, total, f"responses were left out: {reason}")
    warn(num_repeated, total, "responses were left out: they are empty, or repeat another one.")
    return kept


def select(
    groups: Groups,
    *,
    threshold: float | None = None,
    max_per_prompt: int | None = 1,
    keep_truncated: bool = False,
) -> list[Entry]:
    """The responses to train on: of each prompt the best ones of at least the threshold.

    Those of a prompt stand in the order of their scores, the highest first, and of equal scores in
    their own order.

    Args:
      groups: the entries of each prompt.
      threshold: None admits all scores.
      max_per_prompt: the number of responses of a prompt; None takes all.

    Raises:
      InputError: none is left.

    >>> a, b, c = [{"completion": x, "score": s, "ended": True} for x, s in zip("abc", (1, 3, 2))]
    >>> [entry["completion"] for entry in select([[a, b, c]], threshold=2.0, max_per_prompt=None)]
    ['b', 'c']
    """
    candidates = usable(groups, keep_truncated)
    scores = [entry["score"] for group in candidates for entry in group]
    if not scores:
        raise InputError(
            f"None of the {sum(map(len, groups))} sampled responses can be trained on: all are "
            "empty or have no EOS; set keep_truncated to true, or generation.max_new_tokens higher "
            "in another run folder or output."
        )
    selected: list[Entry] = []
    for group in candidates:
        passing = [e for e in group if threshold is None or e["score"] >= threshold]
        selected += sorted(passing, key=lambda entry: -entry["score"])[:max_per_prompt]
    if not selected:
        raise InputError(
            f"No response has a score of the threshold {threshold:g} or more: the best of the "
            f"{len(scores)} that can be trained on has {max(scores):g}; lower the threshold and "
            "run the same command again, which takes the responses that are there."
        )
    return selected


def pairs_of(groups: Groups, keep_truncated: bool = False) -> tuple[list[Entry], int]:
    """(pairs, number of prompts without one): the best response of each prompt and the worst.

    A pair has `prompt`, `chosen`, `rejected`, `score_chosen` and `score_rejected`. Of equal scores
    the first response is taken. A prompt whose responses all have one score, or with fewer than two
    of them, has no pair.

    >>> a, b = [{"completion": x, "score": s, "ended": True} for x, s in (("a", 1), ("b", 2))]
    >>> (pair,), dropped = pairs_of([[a, b], [a, a]])
    >>> pair["chosen"], pair["rejected"], dropped
    ('b', 'a', 1)
    """
    pairs = []
    for group in usable(groups, keep_truncated):
        if not group:
            continue
        best, worst = (choose(group, key=lambda e: e["score"]) for choose in (max, min))
        if best["score"] == worst["score"]:
            continue
        rest = {name: x for name, x in best.items() if name not in ("completion", "score")}
        sides = {"chosen": best, "rejected": worst}
        texts = {name: entry["completion"] for name, entry in sides.items()}
        scores = {f"score_{name}": entry["score"] for name, entry in sides.items()}
        pairs.append({**rest, **texts, **scores})
    return pairs, len(groups) - len(pairs)
