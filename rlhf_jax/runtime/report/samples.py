"""The samples of the report: a prompt, its responses beside one another, and their numbers."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.runtime.report.tables import Entry
from rlhf_jax.runtime.report.values import brief, number, text

MAX_SAMPLES = 24
_JUDGED = ("score", "gold")  # numbers of which more is better


class Number(NamedTuple):
    """A number of a response: its name, text, "up", "down" or "", and its earlier text."""

    name: str
    value: str
    direction: str = ""
    start: str = ""


class Side(NamedTuple):
    """One text of a sample.

    Attributes:
      heading: such as "After", "Step 40" or "chosen".
      latest: whether an earlier response stands beside it.
      text: the response.
      numbers: of the response.
      tokens: the text in pieces; () where they were not logged.
      measures: JSON, name -> one number for each token.
    """

    heading: str
    text: str
    numbers: tuple[Number, ...] = ()
    latest: bool = False
    tokens: tuple[str, ...] = ()
    measures: str = "{}"


class Sample(NamedTuple):
    """A prompt and the texts beside one another; `keys` are numbers to sort by, as JSON."""

    prompt: str
    sides: tuple[Side, ...]
    keys: str


def evaluation_samples(entries: Sequence[Entry]) -> list[Sample]:
    """The samples of `evaluation.json`: of each prompt the response, or those before and after."""
    return [_evaluation_sample(entry) for entry in entries[:MAX_SAMPLES]]


def _evaluation_sample(entry: Entry) -> Sample:
    prompt = text(entry.get("prompt", ""))
    further = [
        _side(each, None, f"Response {number}")
        for number, each in enumerate(entry.get("further") or (), start=2)
    ]
    if "response" in entry:
        sides = _sides(entry, None, "Response", "", together=False)
        return Sample(prompt, (*sides, *further), _keys([entry], {}))
    before, after = (
        {
            "response": entry.get(side, ""),
            **{name: entry.get(f"{side}_{name}") for name in ("gold", "score")},
        }
        for side in ("before", "after")
    )
    after["kl"] = entry.get("kl")
    sides = _sides(after, before, "After", "Before", together=False)
    return Sample(prompt, (*sides, *further), _keys([after], {"gain in score": (after, before)}))


def logged_samples(lines: Sequence[Entry]) -> tuple[list[Sample], str]:
    """The last samples of `samples.jsonl`, each beside the first one for its prompt, and a title.

    Responses to one prompt with a label, such as "chosen", "place 2" or "response 3", are one
    sample; of all but the last, the first has the best score and the last the worst.
    """
    steps = [number(line.get("step")) for line in lines]
    known = [step for step in steps if step is not None]
    if not known:
        return [], ""
    last = [line for line, step in zip(lines, steps) if step == max(known)]
    first = [line for line, step in zip(lines, steps) if step == min(known) < max(known)]
    steps_of = [f"step {step:,.0f}" for step in (max(known), min(known))]
    groups: dict[tuple[str, int], list[tuple[Entry, tuple[Side, ...]]]] = {}
    before = _by_key(first)
    for key, line in _by_key(last).items():
        prompt, label, place = key
        earlier = before.get(key)
        same = earlier is not None and earlier.get("response") == line.get("response")
        now, then = (f"{label}, {step}" if label else step.capitalize() for step in steps_of)
        if label and (same or earlier is None):
            now = label
        sides = _sides(line, earlier, now, then, together=same)
        groups.setdefault((prompt, place), []).append((line, sides))
    samples = []
    for (prompt, _), members in itertools.islice(groups.items(), MAX_SAMPLES):
        entries = [line for line, _ in members]
        is_ranked = len(entries) > 1 and not text(entries[0].get("label")).startswith("response ")
        pair = {"margin": (entries[0], entries[-1])} if is_ranked else {}
        sides = tuple(side for _, each in members for side in each)
        samples.append(Sample(prompt, sides, _keys(entries[:1], pair)))
    return samples, f"Samples of {steps_of[0]}"


def _by_key(lines: Sequence[Entry]) -> dict[tuple[str, str, int], Entry]:
    """The lines by prompt, label, and the number of lines before with the same two."""
    counts: Counter[tuple[str, str]] = Counter()
    keyed = {}
    for line in lines:
        key = text(line.get("prompt", "")), text(line.get("label", ""))
        keyed[*key, counts[key]] = line
        counts[key] += 1
    return keyed


def _sides(
    line: Entry, before: Entry | None, heading: str, earlier: str, *, together: bool
) -> tuple[Side, ...]:
    """The response of a line beside that of an earlier one, and the other texts of the line.

    With `together` both are one side, which shows the earlier numbers as well.
    """
    sides = []
    if before is not None and "response" in before and not together:
        sides.append(_side(before, None, earlier))
    if "response" in line:
        sides.append(_side(line, before, heading, shows_start=together))
    fields = ("prompt", "response", "label")
    others = {name: x for name, x in line.items() if isinstance(x, str) and name not in fields}
    return *sides, *(Side(name, x) for name, x in others.items() if number(x) is None)


def _side(line: Entry, before: Entry | None, heading: str, *, shows_start: bool = False) -> Side:
    numbers = []
    for name, value in _numbers(line).items():
        start = None if before is None else number(before.get(name))
        direction = ""
        if start is not None and name in _JUDGED and value != start:
            direction = "up" if value > start else "down"
        was = brief(start) if shows_start and start is not None else ""
        numbers.append(Number("KL" if name == "kl" else name, brief(value), direction, was))
    response, tokens = text(line["response"]), line.get("tokens")
    pieces, measures = _tokens(tokens) if isinstance(tokens, Mapping) else ((), {})
    latest = before is not None and not shows_start
    return Side(heading, response, tuple(numbers), latest, pieces, json.dumps(measures))


def _tokens(tokens: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """(pieces of text, name -> numbers); without the lists that are not one number a token."""
    pieces = tokens.get("text")
    if not isinstance(pieces, list):
        return (), {}
    measures = {}
    for name, values in tokens.items():
        numbers = [number(x) for x in values] if isinstance(values, list) else []
        kept = [x for x in numbers if x is not None and math.isfinite(x)]
        if len(kept) == len(pieces) > 0:
            measures["KL" if name == "kl" else str(name)] = kept
    return tuple(map(text, pieces)), measures


def _numbers(line: Entry) -> dict[str, float]:
    numbers = {name: number(value) for name, value in line.items() if name not in _NO_NUMBERS}
    return {name: value for name, value in numbers.items() if value is not None}


_NO_NUMBERS = ("step", "prompt", "response", "label")


def _keys(entries: Sequence[Entry], differences: Mapping[str, tuple[Entry, Entry]]) -> str:
    """JSON of the numbers to sort by: those of the entries, differences of scores, the length."""
    keys: dict[str, float] = {}
    for entry in entries:
        keys |= {"KL" if name == "kl" else name: x for name, x in _numbers(entry).items()}
        keys["length"] = len(text(entry.get("response", "")))
    for name, pair in differences.items():
        scores = [_numbers(entry).get("score") for entry in pair]
        if scores[0] is not None and scores[1] is not None:
            keys[name] = scores[0] - scores[1]
    return json.dumps({name: x for name, x in keys.items() if math.isfinite(x)})
