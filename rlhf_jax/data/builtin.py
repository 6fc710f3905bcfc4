"""The embedded corpus: short film reviews from a grammar, with a known utility.

A review is a prompt, which names a film and the company it was seen in, and a response of one to
three short sentences whose judgement follows a latent rating. The simulated preference is
`utility`: short praise in complete sentences. Preference labels follow it, with exactly a tenth of
them flipped, so that the best possible accuracy is 0.90; because the utility is known, the
improvement of a policy can be measured. Everything is a pure function of (seed, number of examples,
split); the two splits share no prompt.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Sequence
from typing import Any, Literal

Example = dict[str, Any]
Split = Literal["train", "eval"]

FLIPPED = 0.1  # share of the preference labels that are wrong, in both splits
MIN_DIFFERENCE = 0.3  # of the utilities of the two responses of a pair
MIN_WORDS, MAX_WORDS = 8, 30  # of a response
COST_PER_WORD = 0.015
UNKNOWN_COST, MAX_UNKNOWN_COST = 0.05, 0.5
INCOMPLETE_COST = 0.5

TITLE_ADJECTIVES = (
    "Silent Golden Hidden Distant Crimson Broken Secret Winter Midnight Lonely".split()
)
TITLE_NOUNS = "Harbor Garden River Mountain Letter Bridge Island Orchard Station Castle".split()
GENRES = "drama comedy thriller western musical mystery romance documentary".split()
COMPANY = ("my sister", "my brother", "my father", "two friends", "a neighbor", "my class")
TIMES = ("last night", "on Friday", "on Sunday", "last week", "in May", "this morning")
PROMPTS = (
    "I saw the {genre} The {title} with {company} {time}.",
    "The {title} is a {genre}. I saw it {time} with {company}.",
    "We went to The {title}, a {genre}, {time}.",
    "{Time} I watched a {genre} called The {title} with {company}.",
)

PRAISE = (
    "superb moving charming brilliant funny tender gripping fresh clever warm beautiful honest"
).split()
BLAME = ("dull clumsy boring awful flat tedious weak messy silly stale bland painful").split()
PLAIN = "plain simple quiet familiar loud modest".split()
PRAISING_ADVERBS = "wonderfully perfectly skillfully".split()
BLAMING_ADVERBS = "badly poorly carelessly".split()
PRAISING_PHRASES = (
    "I loved {it}.",
    "I enjoyed {it}.",
    "I would recommend it.",
    "It made me smile.",
    "It is a treasure.",
    "We were delighted by {it}.",
)
BLAMING_PHRASES = (
    "I hated {it}.",
    "I regret {it}.",
    "I would avoid it.",
    "It made me yawn.",
    "It is a failure.",
    "We were annoyed by {it}.",
)
PLAIN_PHRASES = (
    "It runs for two hours.",
    "It is about a family in a small town.",
    "It takes place in a city by the sea.",
    "There are three main roles.",
    "It was shown on a small screen.",
    "The director is from the north.",
    "It was made long ago.",
)
ASPECTS = (
    "the acting, the plot, the music, the ending, the script, the camera work, the dialogue, "
    "the cast, the first half, the main role"
).split(", ")
VERBS = ("was", "felt", "seemed")
DEGREES = ("very", "really", "quite", "rather")
DEEDS = ("done", "made", "written")

# The words of praise and blame; the utility counts each once.
POSITIVE = frozenset(
    [*PRAISE, *PRAISING_ADVERBS, *"loved enjoyed recommend smile treasure delighted".split()]
)
NEGATIVE = frozenset([*BLAME, *BLAMING_ADVERBS, *"hated regret avoid yawn failure annoyed".split()])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


RESPONSE_PARTS = (
    *(*PRAISE, *BLAME, *PLAIN, *PRAISING_ADVERBS, *BLAMING_ADVERBS, *ASPECTS, *VERBS, *DEGREES),
    *(*DEEDS, *PRAISING_PHRASES, *BLAMING_PHRASES, *PLAIN_PHRASES),
    "and but overall for me film it is an a",
)
VOCABULARY = frozenset(_words(" ".join(RESPONSE_PARTS)))  # all words of the grammar's responses
# A complete sentence has one of these.
PREDICATES = frozenset(
    "was felt seemed is are were made runs takes loved enjoyed recommend hated regret avoid".split()
)


def utility(text: str) -> float:
    """The quality of a review, from which the preferences of the embedded corpus are drawn.

        u = tanh((p - n) / 2) - 0.015 w - 0.5 s - min(0.05 k, 0.5)

    where p and n are the numbers of distinct words of praise and of blame, w is the number of all
    words, s the share of incomplete sentences (without a final stop, a capital, a predicate or a
    third word; 1 for an empty text) and k the number of words that the grammar does not have. The
    utility does not grow with repetition, saturates at a few words of praise, and falls with
    length.

    >>> utility(" The acting was superb.") > utility(" The acting was dull.")
    True
    >>> utility(" superb superb superb superb") < utility(" The acting was superb.")
    True
    """
    words = _words(text)
    unknown = sum(word not in VOCABULARY for word in words)
    return (
        math.tanh(_balance(text) / 2)
        - COST_PER_WORD * len(words)
        - INCOMPLETE_COST * _incomplete(text)
        - min(UNKNOWN_COST * unknown, MAX_UNKNOWN_COST)
    )


def _balance(text: str) -> int:
    """The number of distinct words of praise in a text, minus that of blame."""
    words = _words(text)
    return len(POSITIVE.intersection(words)) - len(NEGATIVE.intersection(words))


def _incomplete(text: str) -> float:
    """The share of incomplete sentences in a text, in [0, 1]."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    complete = sum(
        s[0].isupper() and s[-1] in ".!?" and len(words) >= 3 and not PREDICATES.isdisjoint(words)
        for s, words in ((sentence, _words(sentence)) for sentence in sentences)
    )
    return 1.0 - complete / len(sentences) if sentences else 1.0


def gold_scores(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The utility of each completion, as a reward function; prompts and columns are ignored.

    >>> gold_scores(["I saw The Golden River."], [" It was a treasure. I loved it."])[0] > 0.5
    True
    """
    del prompts, columns
    return [utility(completion) for completion in completions]


# --- the grammar ---------------------------------------------------------------------------------


def _prompt(rng: random.Random, split: Split) -> str:
    """A neutral opening. A fifth of them, by checksum, belongs to the evaluation split."""
    while True:
        time = rng.choice(TIMES)
        prompt = rng.choice(PROMPTS).format(
            title=f"{rng.choice(TITLE_ADJECTIVES)} {rng.choice(TITLE_NOUNS)}",
            genre=rng.choice(GENRES),
            company=rng.choice(COMPANY),
            time=time,
            Time=time[0].upper() + time[1:],
        )
        if (zlib.crc32(prompt.encode()) % 5 == 0) == (split == "eval"):
            return prompt


def _response(rng: random.Random) -> str:
    """A space and one to three sentences that follow a latent rating."""
    rating = rng.choice((0.1, 0.3, 0.5, 0.7, 0.9))
    while True:
        count = rng.choice((1, 2, 2, 3, 3))
        response = "".join(" " + _sentence(rng, rating) for _ in range(count))
        if MIN_WORDS <= len(_words(response)) <= MAX_WORDS:
            return response


def _sentence(rng: random.Random, rating: float) -> str:
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(PLAIN_PHRASES)
    if kind < 0.4:
        phrases = PRAISING_PHRASES if rng.random() < rating else BLAMING_PHRASES
        return rng.choice(phrases).format(it=rng.choice(("it", *ASPECTS)))
    opening = rng.choice(("", "", "", "overall ", "for me "))
    sentence = opening + _clause(rng, rating)
    if kind < 0.65:
        second = _clause(rng, rating)
        opposed = _balance(sentence) * _balance(second) < 0
        sentence += (" but " if opposed else " and ") + second
    return sentence[0].upper() + sentence[1:] + "."


def _clause(rng: random.Random, rating: float) -> str:
    subject = rng.choice(ASPECTS)
    kind = rng.random()
    if kind < 0.15:
        adverbs = PRAISING_ADVERBS if rng.random() < rating else BLAMING_ADVERBS
        return f"{subject} was {rng.choice(adverbs)} {rng.choice(DEEDS)}"
    degree = rng.choice(DEGREES) + " " if kind < 0.4 else ""
    first = second = _adjective(rng, rating)
    while kind > 0.7 and second == first:
        second = _adjective(rng, rating)
    words = degree + first if second == first else f"{first} and {second}"
    return f"{subject} {rng.choice(VERBS)} {words}"


def _adjective(rng: random.Random, rating: float) -> str:
    if rng.random() < 0.15:
        return rng.choice(PLAIN)
    return rng.choice(PRAISE if rng.random() < rating else BLAME)


# --- examples ------------------------------------------------------------------------------------


def _generator(seed: int, kind: str, split: Split) -> random.Random:
    # Strings are hashed by SHA-512, so that neighbouring seeds and kinds are unrelated streams.
    return random.Random(f"film reviews/{kind}/{split}/{seed}")


def texts(seed: int, count: int, split: Split = "train") -> list[Example]:
    """Reviews for supervised fine-tuning: `prompt` and `completion`."""
    rng = _generator(seed, "texts", split)
    return [{"prompt": _prompt(rng, split), "completion": _response(rng)} for _ in range(count)]


def prompts(seed: int, count: int, split: Split = "train") -> list[Example]:
    """Openings to be continued: `prompt`."""
    rng = _generator(seed, "prompts", split)
    return [{"prompt": _prompt(rng, split)} for _ in range(count)]


def pairs(seed: int, count: int, split: Split = "train") -> list[Example]:
    """Preferences: `prompt`, `chosen`, `rejected` and `margin` (0), a tenth of them flipped.

    The utilities of the two responses differ by 0.3 or more; round(0.1 * count) pairs, drawn
    without replacement, are then flipped, so that the best possible accuracy is 0.90.
    """
    rng = _generator(seed, "pairs", split)
    result = [_pair(rng, split) for _ in range(count)]
    for index in rng.sample(range(count), round(FLIPPED * count)):
        pair = result[index]
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    return result


def _pair(rng: random.Random, split: Split) -> Example:
    prompt = _prompt(rng, split)
    while True:
        one, other = _response(rng), _response(rng)
        difference = utility(one) - utility(other)
        if abs(difference) >= MIN_DIFFERENCE:
            better, worse = (one, other) if difference > 0 else (other, one)
            return {"prompt": prompt, "chosen": better, "rejected": worse, "margin": 0.0}
