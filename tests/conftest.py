"""A GPU is for the tests marked `cuda`, which `pytest -m cuda` runs. All others run as where there is none:
their ranks are more than a machine may have GPUs, and what they hold equal is equal on a CPU only.
"""

import os
from pathlib import Path

import pytest


def pytest_configure(config):
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="module")
def forks():
    """Runs of selftrain.py, each a fork of a process that has imported everything."""
    from selfruns import Forks

    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    from selfruns import finished_micro

    return finished_micro(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def small(micro, tmp_path_factory) -> Path:
    """A recipe for a run of seconds, from the models that the micro run has trained."""
    from selfruns import small_world

    return small_world(micro, tmp_path_factory.mktemp("small"))
