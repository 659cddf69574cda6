"""Imports the package and says what that did: see test_house.py."""

import os
import sys

before = dict(os.environ)
import gramr2  # noqa: E402
import gramr2.kernels.reference  # noqa: E402, F401

said = "unchanged" if dict(os.environ) == before else "changed"
loaded = {"transformers", "pyarrow", "liger_kernel", "triton", "pytest"} & set(sys.modules)
print(f"environment {said}, loaded: {sorted(loaded)}")
