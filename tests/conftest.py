"""What holds for every test: the CPU unless the caller says otherwise, and examples that repeat."""

import os

# Before JAX is imported anywhere. One device: tests of sharding start a process with eight.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_FLAGS = os.environ.get("XLA_FLAGS")

import hypothesis  # noqa: E402  (nothing may come before the lines above)
import pytest  # noqa: E402

# The first example of a shape compiles, which takes longer than any deadline; and what failed in CI
# must fail here too.
hypothesis.settings.register_profile(
    "rlhf_jax", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("rlhf_jax")

# What made the golden numbers needs packages that the tests do without.
collect_ignore_glob = ["golden/*"]


@pytest.fixture(scope="session")
def xla_flags_at_start():
    """XLA_FLAGS before any module of the tests was imported."""
    return XLA_FLAGS
