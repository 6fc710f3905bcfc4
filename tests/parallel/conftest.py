"""How fast the programs of these tests run is of no matter, and they are many."""

import pytest

from tests import small


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    with small.few_optimizations():
        yield
