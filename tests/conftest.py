"""Set-up of all tests: the CPU unless the caller says otherwise, programs that are compiled once,
and examples that repeat."""

import atexit
import gc
import logging
import os
import shutil
import tempfile
from pathlib import Path

# Before JAX is imported anywhere; processes that tests start inherit all of it.
# One device: tests of sharding start a process with eight.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_FLAGS = os.environ.get("XLA_FLAGS")

# Most of the time goes into compiling programs that run a few times: XLA leaves most optimizations
# out, but for the files below, which compile as users do unless the caller decides otherwise. (In
# an environment variable, so that pytest's workers know as well.)
IS_DECIDED = os.environ.setdefault(
    "RLHF_JAX_TESTS_OPTIMIZATIONS_DECIDED", str("JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ)
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
OPTIMIZED = (
    "functional/test_facts.py",
    "functional/test_golden.py",
    "functional/test_kl.py",
    "functional/test_normalizer.py",
    "functional/test_preference_extremes.py",
    "functional/test_trl",
    "models/test_gpt2.py",
    "models/test_parity.py",
    "test_end_to_end.py",
)

# Programs are compiled once in a session, whichever test, worker or process needs them first.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="rlhf-jax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# An operation names one line of the source, and not the traceback to it: that saves 7 % of the time
# that compiling takes.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")

import hypothesis  # noqa: E402  (nothing may come before the lines above)
import jax  # noqa: E402
import pytest  # noqa: E402

# The first example of a shape compiles, which takes longer than any deadline; and what failed in CI
# must fail here too.
hypothesis.settings.register_profile(
    "rlhf_jax", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("rlhf_jax")

# The programs of the golden numbers need packages that the tests do without.
collect_ignore_glob = ["golden/*"]


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def optimizations(request):
    """XLA optimizes in the files that are to be compiled as users do."""
    place = request.path.relative_to(Path(__file__).parent).as_posix()
    before = jax.config.values["jax_disable_most_optimizations"]
    if IS_DECIDED == "False" and place.startswith(OPTIMIZED):
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops compiled programs at the end of a module if the process has 16,000 memory maps.

    A program takes about three; Linux allows a process 65,530 (vm.max_map_count), and XLA crashes
    beyond that. Functions called again are traced again, and their programs read from the disk.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 16_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def package_logger():
    """A command that a test runs in its own process sets up logging for that test alone."""
    logger = logging.getLogger("rlhf_jax")
    before = logger.handlers, logger.propagate
    yield
    logger.handlers, logger.propagate = before


@pytest.fixture(scope="session")
def xla_flags_at_start():
    """XLA_FLAGS before any module of the tests was imported."""
    return XLA_FLAGS
