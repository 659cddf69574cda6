"""Recipes: merged in one order, and refused by name."""

from pathlib import Path

import pytest
from test_settings import Some

from gramr2.extras.policy_settings import PolicySettings
from gramr2.files import InputError
from gramr2.recipes import read_recipe, resolve
from gramr2.settings import SelfTrainSettings, Sources, TrainSettings, check_names
from gramr2.stages import STAGES
from selftrain import REGISTRIES

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


def recipe(tmp_path: Path, text: str) -> Path:
    (tmp_path / "r.toml").write_text(text)
    return tmp_path / "r.toml"


def test_later_layers_win_and_the_command_line_is_last(tmp_path):
    """Defaults < [train] < [train.reward] < flags."""
    path = recipe(
        tmp_path, "[train]\nwhole = 2\nreal = 2\nword = 'r'\n[train.reward]\nwhole = 3\nreal = 3.5\n"
    )
    found = resolve(Some, path, ["train", "train.reward"], {"whole": 4})
    assert found == Some(4, 3.5, "r", False, ())
    assert resolve(Some, path, ["train"], {}).real == 2.0
    assert resolve(Some, None, ["train"], {}) == Some()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[train]\nwole = 1", r"\[train\] : unknown setting wole; there are whole, real, word"),
        ("[train.provr]\nwhole = 1", r"unknown table \[train.provr\]; tables are train, train.prover"),
        ("whole = 1", "whole stands outside a table"),
        ("[train]\nwhole = 1.5", "whole: expected a whole number, got 1.5"),
        ("[train]\nflag = 1", "flag: expected true or false, got 1"),
        ("[train]\nnames = [1]", "names: expected text, got 1"),
        ("[train", "not a TOML recipe"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, text, message):
    """A misspelt setting that is passed over trains with a default that nobody chose."""
    with pytest.raises(InputError, match=message.replace(" :", ":?")):
        resolve(Some, recipe(tmp_path, text), ["train"], {})
    with pytest.raises(InputError, match="No such file"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_for_every_stage(path):
    """A recipe that is refused, or a field that was renamed under it, is found here and not on a node."""
    for stage in STAGES.values():
        resolve(TrainSettings, path, ["train", *stage.tables], {})
    resolve(PolicySettings, path, ["train", "train.policy"], {})
    check_names(resolve(SelfTrainSettings, path, ["selftrain"], {}), REGISTRIES)
    resolve(Sources, path, ["models", "data"], {})
