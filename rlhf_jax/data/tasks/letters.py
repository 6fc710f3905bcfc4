"""The task "letters": how often a letter occurs in a word."""

import dataclasses
import random

from rlhf_jax.checks import PositiveInt
from rlhf_jax.data.tasks.problems import Options, Problem, Task, filled
from rlhf_jax.rewards.answers import numeric_match

_CONSONANTS, _VOWELS = "bcdfglmnprst", "aeiou"


@dataclasses.dataclass(frozen=True)
class LetterOptions(Options):
    """Options of the task "letters".

    Attributes:
      syllables: of a word, each a consonant, a vowel and, half of the time, another consonant.
      template: of the question.
    """

    syllables: PositiveInt = 3
    template: str = "How often does the letter {letter} occur in {word}?"


def draw(rng: random.Random, options: LetterOptions) -> Problem:
    """A problem of a word that is made up; a fifth of them ask for any letter of the alphabet."""
    syllables = (
        rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(("", rng.choice(_CONSONANTS)))
        for _ in range(options.syllables)
    )
    word = "".join(syllables)
    letter = rng.choice(word if rng.random() < 0.8 else _CONSONANTS + _VOWELS)
    count = word.count(letter)
    wrong = count + rng.choice((-1, 1)) if count else 1
    question = filled(options.template, letter=letter, word=word)
    return Problem(f"{letter} {word}", question, str(count), str(wrong))


reward = numeric_match
TASK = Task(LetterOptions, draw)
