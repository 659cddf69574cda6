"""Runs a function of a test module in a fresh process: what torch and triton read from the environment, they
read when they start."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(function: Callable, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, __file__, function.__module__, function.__name__, *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> str:
    """-> what it printed."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return printed


def run(function: Callable, *arguments: str, **environment: str) -> str:
    return finish(start(function, *arguments, **environment))


if __name__ == "__main__":
    module, name, *words = sys.argv[1:]
    getattr(importlib.import_module(module), name)(*words)
