"""The reward of ppo.yaml: how positive a film review sounds. Needs the package vaderSentiment."""

import functools


@functools.cache
def analyzer():
    """VADER, a sentiment analyser by word lists and rules (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positive(prompts, completions, **columns):
    """VADER's compound score of each review, prompt and completion together, from -1 to 1."""
    texts = (prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
    return [analyzer().polarity_scores(text)["compound"] for text in texts]
