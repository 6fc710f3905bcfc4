"""Error messages of the runtime, which are one sentence on one line."""

import pytest

from rlhf_jax.errors import InputError


def message(function, *arguments, **keywords):
    """The message of the InputError that a call raises."""
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)
