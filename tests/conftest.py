"""A GPU is for the tests marked `cuda`, which `pytest -m cuda` runs. All others run as where there is none:
their ranks are more than a machine may have GPUs, and what they hold equal is equal on a CPU only.
"""

import os


def pytest_configure(config):
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
