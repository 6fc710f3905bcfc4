"""Finished runs of the stages without a model, for comparison."""

import pytest

from tests.runtime.run import counting


@pytest.fixture(scope="session")
def counting_run(tmp_path_factory):
    """The folder of an uninterrupted run of `CountingStage`."""
    folder = tmp_path_factory.mktemp("counting")
    counting.train(folder)
    return folder


@pytest.fixture(scope="session")
def sampling_run(tmp_path_factory):
    """The folder of an uninterrupted run of `SamplingStage`."""
    folder = tmp_path_factory.mktemp("sampling")
    counting.train(folder, counting.SamplingStage)
    return folder
