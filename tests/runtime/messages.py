"""Error messages of the runtime, which are one sentence on one line."""

import pytest

from rlhf_jax.errors import InputError


def message(function, *arguments, error=InputError, **keywords):
    """The message of the error that a call raises, one line."""
    with pytest.raises(error) as raised:
        function(*arguments, **keywords)
    assert "\n" not in str(raised.value)
    return str(raised.value)
