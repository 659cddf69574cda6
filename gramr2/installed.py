"""What a command says where a package is missing, or is of a version that nobody tried: one line.

Nobody is asked beforehand: a healthy start does not wait, `--help` needs little, and a version that
pyproject.toml does not name is left to work where it works. What breaks is looked into, by `say_why`, in the
place of Python's own last words: where an import fails, the line is all; behind any other traceback it is a
note.

It leaves out the optional extras: who reads a file with one of them names it (extras/datasets.py).
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
# What comes with Python, but not with every one.
PYTHONS_OWN = {
    "fcntl": "this runs on Linux and macOS; on Windows, in WSL",
    "tomllib": f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old; 3.11 or newer is needed",
}
SMALLER = "torch without CUDA is smaller: --extra-index-url https://download.pytorch.org/whl/cpu"


def say_why(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of a command."""
    is_import = isinstance(error, ImportError)
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    line = PYTHONS_OWN.get(missing) or advice(unfit(missing))
    if not (line and is_import):
        sys.__excepthook__(kind, error, trace)
    if line:
        print("error:" if is_import else "note:", line, file=sys.stderr)
        raise SystemExit(2 if is_import else 1)


def advice(unfit: dict[str, str]) -> str:
    """What is wrong, and the command that mends it."""
    if not unfit:
        return ""
    command = " ".join(["pip install", *(f'"{package}"' for package in unfit)])
    hint = f" ({SMALLER})" if any(each.startswith("torch") for each in unfit) else ""
    return f"{', '.join(unfit.values())}: {command}{hint}"


def unfit(missing: str = "") -> dict[str, str]:
    """Packages as pyproject.toml asks for them -> what is wrong with those that are here otherwise, or not.

    One that is asked for under a condition, as Triton is, may be away; `missing` is known to be."""
    from importlib import metadata  # takes longer than the rest of --help

    found = {}
    for asked in asked_for():
        package, condition = (part.strip() for part in asked.partition(";")[::2])
        name = re.split(r"[^\w-]", package)[0]
        if name == missing or not (condition or find_spec(name)):
            found[package] = f"{name} is not installed"
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        for sign, bound in re.findall(r"(>=|<)([\d.]+)", package):
            if (_release(version) < _release(bound)) == (sign == ">="):
                found[package] = f"{name} {version} is too {'old' if sign == '>=' else 'new'}"
    return found


def asked_for() -> list[str]:
    """The dependencies in pyproject.toml: the clone's, or what was made of it when this was installed."""
    if PROJECT.is_file():
        import tomllib

        return tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    from importlib import metadata

    try:
        return [each for each in metadata.requires("gramr2") or () if "extra ==" not in each]
    except metadata.PackageNotFoundError:  # a copy of the files
        return []


def _release(version: str) -> list[int]:
    return [int(part) for part in re.match(r"[\d.]*\d", version)[0].split(".")]
