"""ROUGE: overlap of words, pairs of words and common subsequences of texts with references."""

from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 over pairs of texts, by the package `rouge-score` without its stemmer.

        P = shared / predicted,   R = shared / true,   F1 = 2 P R / (P + R)

    `rouge1` and `rouge2` count shared words and pairs of neighbouring words, with multiplicity;
    `rougeL` is by the longest common subsequence of words; `rougeLsum` by the union, for each line
    of the reference, of those with all lines of the prediction. Words are runs of a-z and 0-9 of
    the text in lower case, so that texts in other scripts have none; F1 is 0 where one of the texts
    has no word. The stemmer is off, as by default in Hugging Face's `evaluate`, by which the
    numbers of TL;DR are published; theirs is the median of bootstrapped means, which hardly differs
    from the mean here.

    Args:
      predictions, references: N texts each, N at least 1.

    Returns:
      The four means, from 0 to 1.

    Lin, ROUGE: A Package for Automatic Evaluation of Summaries, sections 2 and 3 (W04-1013).

    >>> scores = rouge_scores(["the cat sat"], ["the cat ran off"])
    >>> print(round(scores["rouge1"], 4), round(scores["rouge2"], 4))
    0.5714 0.4
    """
    from rouge_score.rouge_scorer import RougeScorer  # here, since it imports nltk, which is slow

    scorer = RougeScorer(ROUGE)
    sums = dict.fromkeys(ROUGE, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        for name, score in scorer.score(reference, prediction).items():
            sums[name] += float(score.fmeasure)
    return {name: total / len(predictions) for name, total in sums.items()}
