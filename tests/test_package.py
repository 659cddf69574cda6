"""What is installed: every folder of the package, the commands by their own names, the recipes by name."""

import sys
import tomllib
from pathlib import Path

import pytest

from gramr2.files import as_started
from gramr2.recipes import RECIPES, recipe_file

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_installed():
    """A new folder that pyproject.toml does not name works in a clone, and is missing from the wheel."""
    folders = {path.parent for pattern in ("*.py", "*/*.py") for path in (ROOT / "gramr2").glob(pattern)}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_commands_of_an_installed_package_are_those_of_a_clone():
    """A link that points nowhere would be a command that a clone has and an installed package has not."""
    scripts = {name.removeprefix("gramr2-") for name in PROJECT["project"]["scripts"]}
    for name in scripts - {"data"}:
        assert (ROOT / f"gramr2/commands/{name}.py").samefile(ROOT / f"{name}.py")
    assert {path.stem for path in ROOT.glob("*.py")} == scripts - {"data"}


SAID = {
    "give --model DIR, or make one: python selftrain.py": "give --model DIR, or make one: gramr2-selftrain",
    "fit it again (infer.py --calibrate)": "fit it again (gramr2-infer --calibrate)",
    "torchrun -n=8 train.py --stage x": "torchrun -n=8 -m gramr2.commands.train --stage x",
}


@pytest.mark.parametrize("clone", SAID)
def test_an_installed_command_names_commands_that_are_there(monkeypatch, clone):
    """Whoever installed a wheel has no `infer.py` to type."""
    assert as_started(clone) == clone
    monkeypatch.setattr(sys, "argv", ["/usr/bin/gramr2-infer"])
    assert as_started(clone) == SAID[clone]


def test_a_recipe_is_named_or_a_file(tmp_path, monkeypatch):
    """A recipe of one's own with the name of a shipped one is the one that was meant; a folder is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro").mkdir()
    assert recipe_file("micro") == RECIPES / "micro.toml"
    (tmp_path / "toy").write_text("")
    assert [recipe_file(name) for name in ("toy", "x.toml")] == [Path("toy"), Path("x.toml")]
