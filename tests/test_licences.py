"""Every file that is shipped, and everything that a recipe names, stands in docs/licences.md."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from gramr2.extras.datasets import DATASETS
from gramr2.recipes import resolve
from gramr2.settings import Sources

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
OTHERS = re.compile(r"copyright\s*(\(c\)|©|\d{4})|SPDX-License|all rights reserved", re.IGNORECASE)


def rows(name: str) -> list[list[str]]:
    """The cells of one of the page's tables, without its head."""
    (table,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def undecided(paths: list[str]) -> list[str]:
    """The files that no pattern of the table names."""
    patterns = [pattern for row in rows("files") for pattern in re.findall(r"`([^`]+)`", row[0])]
    return [path for path in paths if not any(fnmatch(path, pattern) for pattern in patterns)]


def unnamed(paths: list[str]) -> list[str]:
    """The models and data that have no row: it names them, or the directory that they stand in."""
    names = [name for row in rows("named") for name in re.findall(r"`([^`]+)`", row[0])]
    return [
        path for path in paths if not any(path == n or (n[-1] == "/" and path.startswith(n)) for n in names)
    ]


@pytest.fixture(scope="module")
def shipped() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no clone: git lists what is shipped")
    return [path for path in listed.stdout.splitlines() if (ROOT / path).is_file()]


def test_every_shipped_file_may_be_shipped(shipped):
    """A font, a library's script or somebody's data would come in under a licence that nobody looked at."""
    assert undecided(["gramr2/extras/chart.min.js", "benchmarks/pairs.jsonl"])  # there is no row for all
    assert not undecided(shipped)
    assert {row[2] for row in rows("files")} == {"MIT"}  # what `license = "MIT"` says of the package
    says = [path for path in shipped if path.endswith((".py", ".js", ".css", ".html", ".txt"))]
    texts = {
        path: (ROOT / path).read_text(encoding="utf-8") for path in says if path != "tests/test_licences.py"
    }
    assert not [path for path, text in texts.items() if OTHERS.search(text)]
    assert OTHERS.search("/* Copyright (c) 2020 Somebody */")


def test_every_model_and_data_set_that_is_named_has_a_licence():
    """Who follows a recipe has to know what may be done with the model that comes out."""
    named = set()
    for recipe in sorted(ROOT.glob("recipes/*.toml")):
        sources = resolve(Sources, recipe, ["models", "data"], {})
        for value in vars(sources).values():
            named |= {value} if isinstance(value, str) else set(value)
    named = {path for path in named if path and not path.startswith("runs/")}  # the toy makes these itself
    assert len(named) >= 14 and not unnamed(sorted(named))
    assert unnamed(["models/Another-7B"])
    published = {each.published.split(",")[0] for name, each in DATASETS.items() if name != "pairs"}
    assert not [name for name in published if not any(name in row[1] for row in rows("named"))]
    assert all(len(row) == 3 and row[2] for row in rows("named"))


def test_what_says_who_made_it_agrees():
    """A citation of another version leads nowhere; a Python that is promised has to be checked."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE)[1]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation and "\nlicense: MIT\n" in citation
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    checks = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    checked = re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", checks)[1])
    assert promised == checked and f'requires-python = ">={promised[0]}"' in project
