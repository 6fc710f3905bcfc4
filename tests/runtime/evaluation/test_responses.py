"""Tokens of responses as texts with their numbers."""

import numpy as np

from rlhf_jax.data import train_tokenizer
from rlhf_jax.runtime.evaluation.responses import token_entries, token_texts


def test_tokens_are_the_text_in_pieces():
    tokenizer = train_tokenizer(["It was good. It was bad."], 262)
    eos = tokenizer.eos_token_id
    ids = [*tokenizer.encode("It was é €\U0001f600!", add_special_tokens=False), eos]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == f"It was é €\U0001f600!{tokenizer.eos_token}"
    assert pieces[-2:] == ["!", tokenizer.eos_token]
    assert "é" in pieces  # two bytes, of which the second has the text
    assert pieces[pieces.index("é") - 1] == ""
    half = tokenizer.encode("€", add_special_tokens=False)[:-1]
    assert "".join(token_texts(tokenizer, half)) == tokenizer.decode(half)
    assert token_texts(tokenizer, []) == []


def test_tokens_have_a_number_of_each_measure():
    tokenizer = train_tokenizer(["ab"], 258)
    tokens = np.array([tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "cd")])
    mask = np.array([[True, True], [True, False]])
    kl = np.array([[0.123456, -2.0], [3.0, np.nan]])
    entries = token_entries(tokenizer, tokens, mask, {"kl": kl, "value": None}, 5)
    assert entries == [
        {"text": ["a", "b"], "kl": [0.1235, -2.0]},
        {"text": ["c"], "kl": [3.0]},
    ]
    assert len(token_entries(tokenizer, tokens, mask, {}, 1)) == 1
