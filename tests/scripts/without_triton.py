"""Imports everything where there is no Triton, and says which code would run: see test_house.py."""

import importlib.util
import sys

find_spec = importlib.util.find_spec


class Hidden:
    """A finder that comes before all others, and does not know Triton."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)


importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.meta_path.insert(0, Hidden())

import torch  # noqa: E402

import gramr2  # noqa: E402
from gramr2 import kernels  # noqa: E402

assert gramr2.RewardModel and gramr2.generate
kernels.sequence_logprob(torch.ones(2, 16), torch.ones(5, 16), torch.tensor([1, 2]))
print(kernels.backend(), kernels.backend("cuda"))
