"""The likeliest next tokens, by loops: on completions, and on all that the published runs count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import TextBatch
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.models.gpt2 import GPT2, GPT2Config
from rlhf_jax.runtime.evaluation import teacher_forced
from tests.models.gpt2_by_loop import log_softmax, logits_by_loop

EOS, LENGTH = 10, 9
# (text, how many of its last tokens are its completion)
TEXTS = [([1, 5, 2, 9, 10], 3), ([4, 10], 1), ([7, 7, 3, 0, 2, 8], 5)]


class Words:
    """A tokenizer whose tokens are words, and texts are joined of them."""

    eos_token_id = EOS

    def batch_decode(self, sequences, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens
        return [" ".join(f"w{token}" for token in ids if token != EOS) for ids in sequences]


@pytest.fixture(scope="module")
def model():
    return GPT2(GPT2Config(vocab_size=11, n_positions=12, n_embd=8, n_layer=2, n_head=2))


@pytest.fixture(scope="module")
def params(model):
    """Random everywhere, biases and norms too."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), shapes)


@pytest.fixture
def texts(monkeypatch):
    """Three texts, padded to six tokens; the logits of four positions are in memory at a time."""
    monkeypatch.setattr(teacher_forced, "CHUNK", 4)
    tokens, segments = np.zeros((3, 6), np.int32), np.zeros((3, 6), np.int32)
    loss_mask = np.zeros((3, 6), bool)
    for index, (text, completion) in enumerate(TEXTS):
        end = len(text)
        tokens[index, :end], segments[index, :end] = text, 1
        loss_mask[index, end - completion : end] = True
    return TextBatch(tokens, segments, loss_mask)


def rouge1(predicted, true):
    """Of lists of tokens, EOS being none."""
    predicted, left = ([t for t in side if t != EOS] for side in (predicted, true))
    both = len(predicted) + len(left)
    shared = [left.pop(left.index(token)) for token in predicted if token in left]
    return 2 * len(shared) / both if both else 0.0


def test_a_completion_is_predicted_from_the_true_tokens_before_it(model, params, texts):
    expected = []
    for text, completion in TEXTS:
        likeliest = logits_by_loop(params, model.config, text).argmax(axis=1).tolist()
        start = len(text) - completion
        expected.append(rouge1(likeliest[start - 1 : len(text) - 1], text[start:]))
    assert max(expected) > 0
    # The second batch is half empty.
    rouge = teacher_forced.TeacherForcedRouge(model, Words(), texts, batch_size=2)
    assert rouge(params)["rouge1"] == pytest.approx(np.mean(expected))


def test_the_published_way_counts_prompt_and_padding(model, params, texts):
    scores, nll = [], 0.0
    for text, _ in TEXTS:
        padded = text + [EOS] * (LENGTH - len(text))
        # Padding attends to the text alone, and its positions count on.
        logits = logits_by_loop(params, model.config, padded, keys=len(text))
        scores.append(rouge1(logits.argmax(axis=1).tolist(), padded))
        nll -= sum(log_softmax(logits)[t, padded[t + 1]] for t in range(LENGTH - 1))
    assert max(scores) > 0
    result = teacher_forced.published_metrics(
        model, params, Words(), texts, max_length=LENGTH, batch_size=2
    )
    assert result["loss_published"] == pytest.approx(nll / 3 / (LENGTH - 1), rel=1e-4)
    assert result["rouge1_published"] == pytest.approx(np.mean(scores))
    assert result.keys() == {
        "loss_published",
        *(f"rouge{name}_published" for name in ("1", "2", "L", "Lsum")),
    }


def test_no_logits_of_all_positions_are_made(model, params, texts):
    padded = teacher_forced.pad_texts(texts, LENGTH, EOS)
    for runs_padding in (False, True):
        step = teacher_forced.make_predict_step(model, runs_padding=runs_padding)
        text = jax.jit(step).lower(params, padded).as_text()
        assert "4x3x128xf32" in text  # positions at a time, texts, padded vocabulary
        sizes = [(n, v) for n in (8, 9, 12) for v in (11, 128)]
        assert not any(f"3x{n}x{v}xf32" in text or f"{n}x3x{v}xf32" in text for n, v in sizes)


def test_which_examples_have_completions():
    alone, full = DataSettings(), DataSettings(completion_only=False)
    pair, messages = {"prompt": "a", "completion": "b"}, {"messages": []}
    assert teacher_forced.have_completions([pair], full)
    assert teacher_forced.have_completions([messages], alone)
    assert not teacher_forced.have_completions([messages], full)
    assert not teacher_forced.have_completions([{"text": "a"}], alone)
