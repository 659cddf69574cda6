"""How a kernel is launched on a card that was asked: tile sizes, stages, warps and splits, as measured there.

`python benchmarks/tune.py` tries them on the card it runs on and leaves a file, {device: {"kernel, shape":
{name: number}}}. Kernels ask `choice` before a launch; without a file, or a line for them in it, they are
launched with their own built-in numbers. A choice changes speed and the order of sums, never the meaning.

Left out: trying anything at run time. Where the file is: GRAMR2_TUNING, or ~/.cache/gramr2/tuning.json.
"""

import functools
import json
import os
import warnings
from pathlib import Path

import torch


def place() -> Path:
    return Path(os.environ.get("GRAMR2_TUNING") or Path.home() / ".cache/gramr2/tuning.json")


@functools.cache
def choices(device: torch.device) -> dict[str, dict[str, int]]:
    """What was measured on this device, by "kernel, shape"; a file that says nothing usable is reported."""
    path = place()
    if device.type != "cuda" or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(torch.cuda.get_device_name(device), {})
        return {key: {str(name): int(number) for name, number in each.items()} for key, each in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(
            f"{path}: is not used ({error}); python benchmarks/tune.py writes it anew", stacklevel=2
        )
        return {}


@functools.cache
def choice(kernel: str, shape: str, device: torch.device, **built_in: int) -> dict[str, int]:
    """The built-in numbers, or those of them that the file knows better for this kernel and shape."""
    measured = choices(device).get(f"{kernel}, {shape}", {})
    return {name: measured.get(name, number) for name, number in built_in.items()}
