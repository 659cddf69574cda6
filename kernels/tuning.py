"""How a kernel is launched on a card that was asked: tile sizes, stages, warps and splits, as measured there.

`python benchmarks/tune.py` tries them on the card it runs on and leaves a file, {device: {"kernel, shape":
{name: number}}}. Kernels ask `choice` before a launch; without a file, or a line for them in it, they are
launched with their own built-in numbers. A choice changes speed and the order of sums, never the meaning.

Left out: trying anything at run time. Where the file is: GRAMR2_TUNING, or ~/.cache/gramr2/tuning.json.
"""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

FUSION = {"enable_fp_fusion": True}  # the default until Triton 3.9, said aloud since 3.10 changes it
Choices = dict[str, dict[str, int]]  # numbers by name, for each "kernel, shape"
_tried: Choices | None = None  # what stands in the place of the file while something is tried
_asked: Choices = {}  # what kernels asked for since then, with their built-in numbers


def place() -> Path:
    return Path(os.environ.get("GRAMR2_TUNING") or Path.home() / ".cache/gramr2/tuning.json")


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def choices(device: torch.device) -> Choices:
    """What was measured on this device; a file that says nothing usable is reported."""
    path = place()
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(name_of(device), {})
        return {key: {str(name): int(number) for name, number in each.items()} for key, each in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(f"{path} is not used ({error}); benchmarks/tune.py writes it anew", stacklevel=2)
        return {}


@functools.cache
def choice(kernel: str, shape: str, device: torch.device, **built_in: int) -> dict[str, int]:
    """The built-in numbers, or those of them that the file knows better for this kernel and shape."""
    key = f"{kernel}, {shape}"
    _asked[key] = built_in
    measured = (choices(device) if _tried is None else _tried).get(key, {})
    return {name: measured.get(name, number) for name, number in built_in.items()}


@contextlib.contextmanager
def trying(numbers: Choices) -> Iterator[Choices]:
    """For tune.py: these numbers, and no file's. → what is asked for meanwhile, with its built-in numbers."""
    global _tried
    choice.cache_clear()
    _asked.clear()
    _tried = numbers
    try:
        yield _asked
    finally:
        _tried = None
        choice.cache_clear()
