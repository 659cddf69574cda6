"""What a command says where a package is missing, or is of a version that nobody tried: one line.

Nobody is asked beforehand: a healthy start does not wait, `--help` needs little, and a version that
pyproject.toml does not name is left to work where it works. What breaks is looked into, by `say_why`, in the
place of Python's own last words: where an import fails, the line is all; behind any other traceback it is a
note.

It leaves out the optional extras: who reads a file with one of them names it (extras/datasets.py).
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
# What comes with Python, but not with every one.
PYTHONS_OWN = {
    "fcntl": "this runs on Linux and macOS; on Windows, in WSL",
    "tomllib": f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old; 3.11 or newer is needed",
}
SMALLER = " (torch without CUDA is smaller: --extra-index-url https://download.pytorch.org/whl/cpu)"


def say_why(kind, error, trace) -> None:
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
    """What is wrong, and the command that mends it; "" where nothing is."""
    packages = " ".join(f'"{each}"' for each in unfit)
    line = f"{', '.join(unfit.values())}: pip install {packages}" if unfit else ""
    return line + SMALLER * ('"torch' in packages)


def unfit(missing: str = "") -> dict[str, str]:
    """Packages as pyproject.toml asks for them -> what is wrong with those that are here otherwise, or not.

    One that is asked for under a condition, as Triton is, may be away; `missing` is known to be."""
    from importlib import metadata  # takes longer than the rest of --help

    here = {(each.name or "").lower(): each for each in reversed([*metadata.distributions()])}
    found = {}
    for asked in asked_for(here.get("gramr2")):
        package, condition = (part.strip() for part in asked.partition(";")[::2])
        name = re.split(r"[^\w-]", package)[0]
        if name == missing or not (condition or find_spec(name)):
            found[package] = f"{name} is not installed"
        for sign, bound in re.findall(r"(>=|<)([\d.]+)", package) if name in here else ():
            if (_release(here[name].version) < _release(bound)) == (sign == ">="):
                found[package] = f"{name} {here[name].version} is too {'old' if sign == '>=' else 'new'}"
    return found


def asked_for(own) -> list[str]:
    """The dependencies in pyproject.toml: the clone's, or what was made of it when this was installed."""
    if not PROJECT.is_file():
        return [each for each in (own and own.requires) or () if "extra ==" not in each]
    import tomllib

    return tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]


def _release(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
