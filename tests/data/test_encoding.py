"""Parts that the encoders share: padding, EOS, widths, and the check of tokenizers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import encode_pairs, encode_texts
from rlhf_jax.data.encoding import is_empty, pad_left, pad_right, width, with_eos
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.errors import InputError

SEQUENCES = st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=5)


@given(SEQUENCES)
def test_padding_keeps_every_token_on_its_side(sequences):
    for pad, columns in ((pad_left, slice(None, None, -1)), (pad_right, slice(None))):
        tokens, mask = pad(sequences, 7)
        assert tokens.shape == mask.shape == (len(sequences), 7)
        assert (tokens.dtype, mask.dtype) == (np.int32, bool)
        assert [t[m].tolist() for t, m in zip(tokens, mask, strict=True)] == sequences
        assert (np.diff(mask[:, columns].astype(int), axis=1) <= 0).all()
        assert not tokens[~mask].any()


@pytest.mark.parametrize(("tokens", "expected"), [([], [5]), ([1], [1, 5]), ([1, 5], [1, 5])])
def test_eos_is_appended_once(tokens, expected):
    assert with_eos(tokens, 5) == expected


def test_empty_means_nothing_before_eos():
    assert [is_empty(tokens, 5) for tokens in ([], [5], [1], [5, 5])] == [True, True, False, False]


@given(st.lists(st.integers(0, 100), max_size=5), st.integers(1, 100))
def test_width(lengths, most):
    result = width(lengths, most)
    assert result <= most
    assert result == most or result % 8 == 0
    assert result == most or 0 <= result - max(lengths, default=0) < 8


def metaspace(scheme):
    """A tokenizer like those of SentencePiece, which may put a space before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(["Hello, world my friend. 1 2 3 4 + ="] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def words():
    """A tokenizer of words, without the spaces between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate("<unk> </s> Hello world ,".split())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


EXAMPLES = [{"prompt": "Hello", "completion": " world"}, {"prompt": "2+2=", "completion": "4"}]
PAIRS = [{"prompt": "Hello", "chosen": ", world", "rejected": " my"}]


def test_a_tokenizer_that_puts_spaces_between_prompt_and_completion_is_refused():
    settings = DataSettings(packing=False)
    with pytest.raises(InputError, match=r"of example 2 apart as '2\+2= 4', together as '2\+2=4':"):
        encode_texts(EXAMPLES, metaspace("always"), settings)
    with pytest.raises(InputError, match="of example 1 apart as 'Hello , world', together as 'He"):
        encode_pairs(PAIRS, metaspace("first"), settings)


def test_tokenizers_whose_parts_are_the_text_are_accepted(tokenizer):
    settings = DataSettings(packing=False)
    for accepted, examples in ((metaspace("always"), EXAMPLES[:1]), (tokenizer, EXAMPLES)):
        assert len(encode_texts(examples, accepted, settings).tokens) == len(examples)
    # One that loses a leading space everywhere loses it together, too.
    assert len(encode_pairs(PAIRS, words(), settings).valid) == 1
