"""The embedded corpus: the same examples from the same seed, balance, labels, and its utility."""

import re
import zlib

import numpy as np
import pytest

from rlhf_jax.data import builtin

CHECKSUM = 1893179920
MAKERS = [builtin.texts, builtin.pairs, builtin.prompts]


def words(text):
    return re.findall(r"[a-z']+", text.lower())


@pytest.mark.parametrize("make", MAKERS)
def test_examples_are_a_function_of_seed_and_split(make):
    examples = make(0, 50)
    assert make(0, 50) == examples
    assert make(1, 50) != examples
    assert make(0, 50, "eval") != examples
    assert make(0, 0) == []


def test_the_corpus_does_not_drift():
    """Numbers in the documentation come from these examples: a change of the grammar shows here."""
    examples = [*builtin.texts(0, 100), *builtin.pairs(0, 100), *builtin.prompts(0, 100, "eval")]
    assert zlib.crc32(repr(examples).encode()) == CHECKSUM


@pytest.mark.parametrize("make", MAKERS)
def test_splits_share_no_prompt(make):
    train = {example["prompt"] for other in MAKERS for example in other(0, 1500)}
    held = {example["prompt"] for example in make(0, 500, "eval")}
    assert len(held) > 400
    assert not train & held


def test_prompts_are_many_short_and_neutral():
    examples = builtin.prompts(0, 2000)
    assert len({example["prompt"] for example in examples}) > 1500
    for example in examples:
        result = words(example["prompt"])
        assert 8 <= len(result) <= 16
        assert not (builtin.POSITIVE | builtin.NEGATIVE).intersection(result)
        assert example["prompt"][0].isupper()
        assert example["prompt"].endswith(".")
        assert "{" not in example["prompt"]


def test_responses_are_short_complete_sentences_of_known_words():
    for example in builtin.texts(0, 1000):
        text = example["completion"]
        assert text.startswith(" ")
        assert 8 <= len(words(text)) <= 30
        assert 1 <= text.count(".") <= 3
        assert set(words(text)) <= builtin.VOCABULARY
        assert all(re.match(r"[A-Z][a-z ]+\.$", s) for s in re.split(r"(?<=\.) ", text.strip()))


def test_the_vocabulary_is_small():
    examples = builtin.texts(0, 2000)
    result = {word for each in examples for word in words(each["prompt"] + each["completion"])}
    assert 150 <= len(result) <= 250
    assert not builtin.POSITIVE & builtin.NEGATIVE
    assert result >= builtin.POSITIVE | builtin.NEGATIVE


def test_praise_and_blame_are_balanced():
    result = [word for example in builtin.texts(0, 4000) for word in words(example["completion"])]
    praise = sum(word in builtin.POSITIVE for word in result)
    blame = sum(word in builtin.NEGATIVE for word in result)
    assert 0.95 < praise / blame < 1.05


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize(("count", "flipped"), [(1000, 100), (512, 51), (5, 0)])
def test_exactly_a_tenth_of_the_labels_are_wrong(split, count, flipped):
    result = builtin.pairs(0, count, split)
    differences = np.array(
        [builtin.utility(each["chosen"]) - builtin.utility(each["rejected"]) for each in result]
    )
    assert (np.abs(differences) >= 0.3).all()
    assert (differences < 0).sum() == flipped


def test_flips_are_spread_and_lengths_do_not_give_the_answer_away():
    result = builtin.pairs(0, 4000)
    wrong = [builtin.utility(each["chosen"]) < builtin.utility(each["rejected"]) for each in result]
    assert 150 < sum(wrong[:2000]) < 250
    shorter = np.mean([len(example["chosen"]) < len(example["rejected"]) for example in result])
    assert 0.4 < shorter < 0.65


def test_utility_rises_with_praise_and_falls_with_blame():
    sentences = [
        " The acting was awful and dull.",
        " The acting was loud and dull.",
        " The acting was loud and plain.",
        " The acting was loud and superb.",
        " The acting was warm and superb.",
    ]
    scores = builtin.gold_scores([""] * 5, sentences)
    assert (np.diff(scores) > 0.2).all()


def test_utility_saturates_and_counts_a_word_once():
    one = " The acting was superb."
    again = one + " The plot was superb."
    assert builtin.utility(again) < builtin.utility(one)
    many = one + "".join(f" The plot was {word}." for word in builtin.PRAISE[1:6])
    more = many + "".join(f" The plot was {word}." for word in builtin.PRAISE[6:])
    assert builtin.utility(more) < builtin.utility(many)


@pytest.mark.parametrize(
    "degenerate",
    [
        "",
        " superb" * 20,
        " Superb! Charming! Funny!",
        " superb moving charming brilliant",
        " The acting was superb",
        " the acting was superb.",
        " Xq zzk was superb vlorp.",
        " The acting was superb." * 8,
    ],
)
def test_nonsense_scores_below_a_plain_good_review(degenerate):
    assert (
        builtin.utility(degenerate) < builtin.utility(" The acting was superb. I loved it.") - 0.1
    )


def test_brevity_counts_a_little():
    short = " The acting was superb."
    long = " The acting was superb. It is about a family in a small town."
    assert 0.05 < builtin.utility(short) - builtin.utility(long) < 0.2


def test_gold_scores_take_further_columns():
    scores = builtin.gold_scores(["p", "q"], [" I loved it.", " I hated it."], label=[1, 2])
    assert all(isinstance(score, float) for score in scores)
    assert scores[0] > 0 > scores[1]
