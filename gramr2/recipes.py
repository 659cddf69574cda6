"""Recipes: a run's settings in a TOML file, laid between the defaults and the command line.

A recipe's tables: [train] and, over it, [train.STAGE] (stages.py says which lie over it for each stage);
[selftrain]; [world], the toy world's sizes; [models], where the backbone and the prover's base stand; [data],
the files of each kind. `resolve` merges defaults, tables and command line in that order; what they leave open
of a training is chosen by the model's size and the data (`suited`), but for the toy. What is not known is
refused by its name: a misspelt setting that is passed over trains with a default that nobody chose.

It leaves out: what the settings mean (settings.py), and flags (`settings.add_flags`).
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from gramr2.directories import model_file
from gramr2.fields import Fields, typed
from gramr2.files import InputError, need, open_file, read_json, read_text
from gramr2.settings import TrainSettings
from gramr2.stages import STAGES

Settings = TypeVar("Settings")
RECIPES = (Path(__file__).parent / "commands/recipes").resolve()
TABLES = ("train", *dict.fromkeys(table for stage in STAGES.values() for table in stage.tables))
TABLES += ("train.policy", "selftrain", "world", "models", "data")  # policy: extras/policy_settings.py


def recipe_file(name: str) -> Path:
    """A recipe as a command line names it: a file, or one of those that are shipped, by its name."""
    shipped = RECIPES / f"{name}.toml"
    return shipped if shipped.is_file() and not Path(name).is_file() else Path(name)


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
    cls: type[Settings], recipe: str | Path | None, tables: Sequence[str], overrides: dict[str, Any],
    model: str | Path | None = None, data: Sequence[str | Path] = (), limit: int | None = None,
) -> Settings:  # fmt: skip
    """Defaults, then the recipe's tables in this order, then what the command line says.

    With `model`, the one that is trained: what neither says of `SUITED` is as suits that and the data, of
    which `limit` rows are taken.
    """
    found = read_recipe(recipe) if recipe is not None else {}
    layers = [(f"{recipe} [{name}]", found.get(name, {})) for name in tables]
    kinds = typing.get_type_hints(cls)
    merged: dict[str, Any] = {}
    for where, values in (*layers, ("command line", overrides)):
        for name, value in values.items():
            if name not in kinds:
                raise InputError(f"{where}: unknown setting {name}; there are {', '.join(kinds)}")
            merged[name] = typed(value, kinds[name], f"{where} {name}")
    open_ones = SUITED.difference(merged, ["epochs"] if merged.get("steps") else [])
    if model and open_ones:
        suits = suited(Path(model), data, limit or merged.get("limit"))
        suits["lr"] *= getattr(cls, "lr_share", 1.0) * (LORA_LR if merged.get("lora_rank") else 1)
        merged |= {name: suits[name] for name in open_ones}
    return cls(**merged)


# ---------------------------------------------------------------------------------- what suits a model


SUITED = {"lr", "batch_size", "epochs", "max_length"}
FEW = 10_000  # rows; fewer are seen three times
UPDATES = 100  # steps that a training should take at least, so that its learning rate can rise and fall


LORA_LR = 10  # times the rate of full tuning suits adapters: their product moves more slowly at first


def suited_lr(parameters: float) -> float:
    """A line, on logarithmic axes, through the rates of our recipes: 1e-2 for the toy's 0.3M, 1e-5 for 3B."""
    return float(f"{1e-5 * (3e9 / parameters) ** 0.75:.0e}")


def suited(model: Path, data: Sequence[str | Path], limit: int | None = None) -> dict[str, Any]:
    """`SUITED` for a model's size, and for how many rows its data have. Needs neither weights nor torch."""
    need(model.is_dir(), f"{model}: no such model directory; download or train one first")
    path = model_file(model, "config.json")
    config = Fields(read_json(path), f"{path}: ")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
    words, width, blocks, inner, room = (config.get(name, int, low=1) for name in names)
    rows = sum(sum(1 for _ in open_file(path)) for path in data if Path(path).is_file())
    rows = min(rows, limit or rows)
    epochs = 3.0 if rows < FEW else 1.0
    batch = min(64, max(8, int(rows * epochs) // UPDATES))
    return {
        "lr": suited_lr(words * width + blocks * width * (3 * width + 3 * inner)),
        "batch_size": 1 << (batch.bit_length() - 1),
        "epochs": epochs,
        "max_length": min(room, TrainSettings.token_budget),  # packed: one that is not used costs nothing
    }
