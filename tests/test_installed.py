"""A package that is missing, or of the wrong version, is a line that says what to type."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from gramr2 import installed

ROOT = Path(__file__).parents[1]
FOUND = [*metadata.distributions()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def start(place, hidden: str, script: str, *words: str) -> subprocess.CompletedProcess:
    line = [sys.executable, ROOT / "tests/scripts/without.py", hidden, ROOT / script, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=place)


@pytest.mark.parametrize(
    ("hidden", "line"),
    [
        ("numpy", ("infer.py", "--help")),  # at the top of what a script imports
        ("tqdm", ("gramr2/extras/datasets.py",)),
        ("torch", ("infer.py", "--formats")),  # in its main
        ("torch", ("train.py", "--stage", "reward", "--dry-run")),
        ("safetensors", ("selftrain.py", "--recipe", "micro")),
        ("tokenizers", ("selftrain.py", "--recipe", "micro")),
        ("numpy,tqdm", ("infer.py", "--formats")),
    ],
    ids=str,
)
def test_what_is_missing_is_a_line_that_says_what_to_install(hidden, line, tmp_path):
    result = start(tmp_path, hidden, *line)
    assert result.returncode == 2 and result.stdout == ""
    said = result.stderr.splitlines()[-1]
    assert said.startswith("error: ") and "Traceback" not in result.stderr
    asked = [each for each in PROJECT["dependencies"] if re.split(r"[^\w-]", each)[0] in hidden.split(",")]
    assert len(asked) == len(hidden.split(",")) and not [each for each in asked if f'"{each}"' not in said]


@pytest.mark.parametrize(("hidden", "said"), [("fcntl", "WSL"), ("tomllib", PROJECT["requires-python"][2:])])
def test_another_system_and_an_old_python_are_a_line(hidden, said, tmp_path):
    result = start(tmp_path, hidden, "selftrain.py", "--help")
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_in_this_environment_nothing_is_to_be_said():
    assert installed.unfit() == {}


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("torch", "2.10.1+cu130", "too old"),
        ("torch", "2.14.0", "too new"),
        ("torch", "2.13.1.post2+cpu", None),
        ("torch", "2.11.0a0+vendor25.12", None),  # as NVIDIA's images name theirs
        ("triton", "3.5.1", "too old"),
        ("triton", None, None),  # the reference runs, as on macOS
        ("tokenizers", "0.20.3", "too old"),
        ("numpy", "3.0.0", None),
    ],
)
def test_a_version_is_held_to_what_is_asked_for(package, version, said, monkeypatch):
    here = {each.name.lower(): SimpleNamespace(name=each.name, version=each.version) for each in FOUND}
    here[package] = SimpleNamespace(name=package, version=version)
    monkeypatch.setattr(metadata, "distributions", lambda: [each for each in here.values() if each.version])
    monkeypatch.setattr(installed, "find_spec", lambda name: name != "triton")
    unfit = installed.unfit()
    assert list(unfit.values()) == ([f"{package} {version} is {said}"] if said else [])
    start = f'{package} {version} is {said}: pip install "{package}>='
    assert not unfit or installed.advice(unfit).startswith(start)


def test_an_installed_package_asks_for_what_the_clone_does(monkeypatch, tmp_path):
    """A wheel has no pyproject.toml: there the answer is in what pip wrote down."""
    own = next((each for each in FOUND if each.name == "gramr2"), None)
    if own is None:
        pytest.skip("gramr2 is not installed here")
    assert installed.asked_for(own) == PROJECT["dependencies"]
    monkeypatch.setattr(installed, "PROJECT", tmp_path / "pyproject.toml")
    asked = [sorted(re.findall(r"[\w.]+|[<>=]+", each)) for each in installed.asked_for(own)]
    assert asked == [sorted(re.findall(r"[\w.]+|[<>=]+", each)) for each in PROJECT["dependencies"]]
    assert installed.asked_for(None) == []  # a copy of the files


def test_what_breaks_on_another_version_keeps_its_traceback_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(installed, "unfit", lambda missing: {"torch>=2.11,<2.14": "torch 2.15.0 is too new"})
    for error, status, first in (
        (AttributeError("gone"), 1, "AttributeError: gone\nnote: torch 2.15.0"),
        (ImportError("cannot import name 'x' from 'torch'"), 2, "error: torch 2.15.0 is too new"),
    ):
        with pytest.raises(SystemExit) as end:
            installed.say_why(type(error), error, None)
        said = capsys.readouterr().err
        assert end.value.code == status and said.startswith(first) and said.endswith("/whl/cpu)\n")


def test_other_errors_are_left_as_they_are(capsys):
    for error in (ValueError("a fault"), ModuleNotFoundError("No module named 'nowhere'", name="nowhere")):
        assert installed.say_why(type(error), error, None) is None
        assert capsys.readouterr().err.strip() == f"{type(error).__name__}: {error}"
