"""Messages between hosts: what is restored, and that none of them runs code."""

import pickle

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.messages import decode, encode

VALUES = [
    None,
    True,
    10**30,
    0.1,
    float("-inf"),
    "text \ud800 ß",
    [1, [2.5, None]],
    (1, ("a", [])),
    {1: {"dict": 2}, "tuple": (3,), "array": [4], 2.5: {}},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_results_are_restored(value):
    result, error = decode(encode(value))
    assert error is None
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_arrays_are_restored(shape, dtype):
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    result, _ = decode(encode(array))
    assert (result.dtype, result.shape) == (dtype, shape)
    np.testing.assert_array_equal(result, array)
    assert decode(encode(list(array.ravel()))) == (array.ravel().tolist(), None)


class Special(FloatingPointError):
    """Of no module that the other host may import."""

    def __init__(self, step, **more):
        super().__init__(f"in step {step}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("data.path is missing."), InputError),
        (KeyError("x"), KeyError),
        (OSError(2, "No such file", "a/b"), FileNotFoundError),
        (Special(3), FloatingPointError),
        (ZeroDivisionError(), ZeroDivisionError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), RuntimeError),
        (ValueError(object), RuntimeError),
    ],
    ids=repr,
)
def test_errors_are_restored(error, kind):
    error.add_note("of the first host")
    result, restored = decode(encode(None, error))
    assert result is None
    assert type(restored) is kind
    assert str(restored).endswith(str(error))
    assert restored.__notes__ == ["of the first host"]


def test_other_results_are_refused():
    with pytest.raises(TypeError, match="may not hold a set"):
        encode([{1}])


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("code was run",))


@pytest.mark.parametrize(
    "name", ["SystemExit", "eval", "__import__", "rlhf_jax.errors.InputError", "type"]
)
def test_names_of_no_exception_are_not_called(name):
    message = b'{"error": {"name": "%s", "arguments": ["1"], "notes": []}}' % name.encode()
    assert type(decode(message)[1]) is RuntimeError
    with pytest.raises(ValueError, match="."):
        decode(pickle.dumps(Harmful()))
