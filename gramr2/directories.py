"""Model directories: which files make one, and where an adapter's has the rest of them.

A directory holds a whole model, as Hugging Face's hub has them, or an adapter in PEFT's format (lora.py),
which names its base's directory. What an adapter's does not hold itself (configuration, tokenizer) is its
base's, so that whoever asks `model_file` need not know of adapters.

It leaves out: what the files say (weights.py, tokenizer.py), and downloads: a base on a hub is refused.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from gramr2.fields import Fields
from gramr2.files import InputError, need, open_file, read_errors_as_input_errors, read_json
from gramr2.seals import CARD, SEALS

ADAPTER = "adapter_config.json"


def adapter_config(directory: Path) -> Fields | None:
    """What an adapter's directory says of it; None where a whole model stands there."""
    path = directory / ADAPTER
    return Fields(read_json(path), f"{path}: ") if path.is_file() else None


def base_of(directory: Path) -> Path | None:
    """Where the whole model stands that an adapter is for; None where `directory` has a whole one itself."""
    config = adapter_config(directory)
    if config is None:
        return None
    named = config.get("base_model_name_or_path", str)
    base = next((place for place in (Path(named), directory / named) if place.is_dir()), None)
    mend = "write the directory where it stands into base_model_name_or_path"
    if base is None:
        raise InputError(f"{config.where}there is no base model {named} here; {mend}")
    need(
        not (base / ADAPTER).exists(), f"{config.where}its base {base} is an adapter itself; merge that first"
    )
    return base


def model_file(directory: Path, name: str) -> Path:
    """Where a model's file stands: in its directory or, what an adapter's lacks, in its base's."""
    base = None if (directory / name).is_file() else base_of(directory)
    return (base or directory) / name


def model_files(directory: Path) -> list[Path]:
    """What makes a model answer as it does: all of its directory, but for what is only said of it there, and
    all of its base's.

    The card of a model that was trained here is such; a published one's may show the prompt that it wants.
    """
    with read_errors_as_input_errors(directory):
        every = sorted(path for path in directory.iterdir() if path.is_file() and path.name[0] != ".")
    said = [SEALS, "training.json", "calibration.json"]
    said += [CARD] if (directory / "training.json").is_file() else []
    base = base_of(directory)
    return [path for path in every if path.name not in said] + (model_files(base) if base else [])


def open_tensors(path: Path) -> safe_open:
    """A file of tensors, mapped."""
    try:
        with open_file(path):  # a pipe would be waited for
            return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not safetensors ({error}); copy the file again") from None
