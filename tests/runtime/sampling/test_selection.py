"""Selections and pairs of scored responses, against plain loops."""

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.runtime.sampling.selection import pairs_of, select


@pytest.fixture(scope="module")
def groups():
    """40 prompts with 6 responses each: some empty, repeated or cut off, with many equal scores."""
    rng = np.random.default_rng(0)
    return [
        [
            {
                "prompt": f"p{number}",
                "completion": str(rng.choice(["a", "b", "c", "d", "e", " "])),
                "score": float(rng.integers(4)),
                "ended": bool(rng.random() < 0.8),
            }
            for _ in range(6)
        ]
        for number in range(40)
    ]


def candidates(group, keep_truncated):
    """The positions of the responses that may be taken."""
    kept = []
    for place, each in enumerate(group):
        seen = [group[earlier]["completion"] for earlier in kept]
        is_usable = each["completion"].strip() and each["completion"] not in seen
        if is_usable and (each["ended"] or keep_truncated):
            kept.append(place)
    return kept


@pytest.mark.parametrize(
    ("threshold", "count", "keep_truncated"), [(None, 1, False), (2.0, None, True), (1.0, 2, False)]
)
def test_selected_responses_are_those_of_a_loop(groups, threshold, count, keep_truncated):
    expected = []
    for group in groups:
        left = candidates(group, keep_truncated)
        taken = 0
        while left and (count is None or taken < count):
            best = left[0]
            for place in left:
                if group[place]["score"] > group[best]["score"]:
                    best = place
            left.remove(best)
            if threshold is None or group[best]["score"] >= threshold:
                expected.append({k: group[best][k] for k in ("prompt", "completion", "score")})
                taken += 1
    options = {"max_per_prompt": count, "keep_truncated": keep_truncated}
    assert select(groups, threshold=threshold, **options) == expected
    assert expected


def test_pairs_are_those_of_a_loop(groups):
    expected = []
    for group in groups:
        kept = [group[place] for place in candidates(group, False)]
        scores = [each["score"] for each in kept]
        if scores and max(scores) > min(scores):
            best, worst = kept[scores.index(max(scores))], kept[scores.index(min(scores))]
            expected.append(
                {
                    "prompt": group[0]["prompt"],
                    "chosen": best["completion"],
                    "rejected": worst["completion"],
                    "score_chosen": best["score"],
                    "score_rejected": worst["score"],
                }
            )
    assert pairs_of(groups) == (expected, 40 - len(expected))
    assert 0 < len(expected) < 40


def test_a_selection_without_a_response_says_why(groups):
    with pytest.raises(InputError, match=r"threshold 9 or more: the best of the \d+ .* has 3; low"):
        select(groups, threshold=9.0)
    cut_off = [[{**each, "ended": False} for each in group] for group in groups]
    with pytest.raises(InputError, match="None of the 240 sampled responses can be trained on"):
        select(cut_off)


def test_responses_that_are_left_out_are_counted(groups, caplog):
    select(groups)
    ended = [[each for each in group if each["ended"]] for group in groups]
    cut_off = 240 - sum(map(len, ended))
    others = sum(len(group) - len(candidates(group, False)) for group in ended)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" responses")[0] for line in said] == [
        f"{cut_off} of 240",
        f"{others} of 240",
    ]
