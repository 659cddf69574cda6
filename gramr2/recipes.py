"""Recipes: a run's settings in a TOML file, laid between the defaults and the command line.

A recipe's tables: [train] and, over it, [train.STAGE] (stages.py says which lie over it for each stage);
[selftrain]; [world], the toy world's sizes; [models], where the backbone and the prover's base stand; [data],
the files of each kind. `resolve` merges defaults, tables and command line in that order. What is not known
is refused by its name: a misspelt setting that is passed over trains with a default that nobody chose.

It leaves out: what the settings mean (settings.py), and flags (`settings.add_flags`).
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from gramr2.fields import typed
from gramr2.files import InputError, read_text
from gramr2.stages import STAGES

Settings = TypeVar("Settings")
TABLES = ("train", *dict.fromkeys(table for stage in STAGES.values() for table in stage.tables))
TABLES += ("train.policy", "selftrain", "world", "models", "data")  # policy: extras/policy_settings.py


def read_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """A recipe's tables by their dotted names; a table that no recipe has is refused."""
    try:
        raw = tomllib.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deep nesting, too
        raise InputError(f"{path}: not a TOML recipe ({error})") from None
    tables: dict[str, dict[str, Any]] = {}
    for name, table in raw.items():
        if not isinstance(table, dict):
            raise InputError(f"{path}: {name} stands outside a table; tables are {', '.join(TABLES)}")
        tables[name] = {key: value for key, value in table.items() if not isinstance(value, dict)}
        tables |= {f"{name}.{key}": value for key, value in table.items() if isinstance(value, dict)}
    for name in (name for name in tables if name not in TABLES):
        raise InputError(f"{path}: unknown table [{name}]; tables are {', '.join(TABLES)}")
    return tables


def resolve(
    cls: type[Settings], recipe: str | Path | None, tables: Sequence[str], overrides: dict[str, Any]
) -> Settings:
    """Defaults, then the recipe's tables in this order, then what the command line says."""
    found = read_recipe(recipe) if recipe is not None else {}
    layers = [(f"{recipe} [{name}]", found.get(name, {})) for name in tables]
    kinds = typing.get_type_hints(cls)
    merged: dict[str, Any] = {}
    for where, values in (*layers, ("command line", overrides)):
        for name, value in values.items():
            if name not in kinds:
                raise InputError(f"{where}: unknown setting {name}; there are {', '.join(kinds)}")
            merged[name] = typed(value, kinds[name], f"{where} {name}")
    return cls(**merged)
