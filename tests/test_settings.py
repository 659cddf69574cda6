"""Recipes and flags: merged in one order, and refused by name."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from gramr2.denoise import FILTERS
from gramr2.extras.policy_settings import PolicySettings
from gramr2.files import InputError
from gramr2.recipes import read_recipe, resolve
from gramr2.selection import SCORES
from gramr2.settings import (
    SelfTrainSettings,
    Sources,
    TrainSettings,
    add_flags,
    check_names,
    given,
    setting,
)
from gramr2.stages import STAGES

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
REGISTRIES = {"select_by": SCORES, "without": FILTERS}


@dataclass(frozen=True)
class Some:
    whole: int = setting(1, "a number, 100% whole")
    real: float = setting(0.5, "a real")
    word: str = setting("x", "a word")
    flag: bool = setting(False, "a flag")
    names: tuple[str, ...] = setting((), "some names")


def parse(*argv: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser, Some)
    assert "a number, 100% whole [1]" in " ".join(parser.format_help().split())
    return given(Some, parser.parse_args(argv))


def recipe(tmp_path: Path, text: str) -> Path:
    (tmp_path / "r.toml").write_text(text)
    return tmp_path / "r.toml"


def test_later_layers_win_and_the_command_line_is_last(tmp_path):
    """Defaults < [train] < [train.reward] < flags."""
    path = recipe(
        tmp_path, "[train]\nwhole = 2\nreal = 2\nword = 'r'\n[train.reward]\nwhole = 3\nreal = 3.5\n"
    )
    found = resolve(Some, path, ["train", "train.reward"], parse("--whole", "4"))
    assert found == Some(4, 3.5, "r", False, ())
    assert resolve(Some, path, ["train"], {}).real == 2.0
    assert resolve(Some, None, ["train"], {}) == Some()


def test_flags_of_every_kind():
    assert parse() == {}
    assert parse("--flag") == {"flag": True} == parse("--flag", "true")
    assert parse("--no-flag") == {"flag": False} == parse("--flag", "false")
    assert parse("--names", "a", "b") == parse("--names", "a", "--names", "b") == {"names": ["a", "b"]}
    assert resolve(Some, None, [], parse("--names", "a")).names == ("a",)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[train]\nwole = 1", r"\[train\] : unknown setting wole; there are whole, real, word"),
        ("[train.provr]\nwhole = 1", r"unknown table \[train.provr\]; tables are train, train.prover"),
        ("whole = 1", "whole stands outside a table"),
        ("[train]\nwhole = 1.5", "whole: expected a whole number, got 1.5"),
        ("[train]\nflag = 1", "flag: expected true or false, got 1"),
        ("[train]\nnames = [1]", "names: expected a string, got 1"),
        ("[train", "not a TOML recipe"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, text, message):
    """A misspelt setting that is passed over trains with a default that nobody chose."""
    with pytest.raises(InputError, match=message.replace(" :", ":?")):
        resolve(Some, recipe(tmp_path, text), ["train"], {})
    with pytest.raises(InputError, match="No such file"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "field, value", [("lr", 0.0), ("batch_size", 0), ("warmup", 1.5), ("steps", -1), ("dtype", "int8")]
)
def test_values_out_of_range_name_their_field(field, value):
    with pytest.raises(InputError, match=f"^{field}: "):
        TrainSettings(**{field: value})


def test_a_budget_below_the_longest_example_is_refused():
    with pytest.raises(InputError, match="token_budget: 100 is less than max_length 200"):
        TrainSettings(max_length=200, token_budget=100)


def test_the_loops_thresholds_hold_on_and_wrong_ones_are_refused(tmp_path):
    path = recipe(tmp_path, "[selftrain]\nconfidence = 1\n")
    assert resolve(SelfTrainSettings, path, ["selftrain"], {}).confidence == (1.0,)
    settings = resolve(SelfTrainSettings, path, ["selftrain"], {"confidence": [0.75, 0.8]})
    assert [settings.filters(number).confidence for number in (1, 2, 3)] == [0.75, 0.8, 0.8]
    for value, message in [
        ([], "confidence"),
        ([0.5, 1.5], "confidence: .*1.5.* from 0 to 1"),
        (["high"], "confidence: expected a number, got 'high'"),
    ]:
        with pytest.raises(InputError, match=message):
            resolve(SelfTrainSettings, path, ["selftrain"], {"confidence": value})


def test_a_name_that_no_registry_has_is_refused_and_help_says_which_there_are():
    """A misspelt filter would stay on, and the run would be reported as one without it."""
    names = "agreement, confidence, softmax, length, structure, states_label, states_other, mentions, "
    names += "repetition, quotes, coherence"
    for settings, message in [
        (SelfTrainSettings(without=("agreemnt",)), rf"^without: \('agreemnt',\) must be of {names}$"),
        (SelfTrainSettings(select_by="best"), "^select_by: 'best' must be one of equation-5, numerator, "),
    ]:
        with pytest.raises(InputError, match=message):
            check_names(settings, REGISTRIES)
    check_names(SelfTrainSettings(without=FILTERS, select_by="contrast"), REGISTRIES)
    parser = argparse.ArgumentParser()
    add_flags(parser, SelfTrainSettings, REGISTRIES)
    words = " ".join(parser.format_help().split())
    assert f"filters that are switched off, of {names} [none]" in words
    assert "is chosen: equation-5, numerator, contrast, random [equation-5]" in words


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_for_every_stage(path):
    """A recipe that is refused, or a name that changed under it, is found here and not on a node."""
    check_names(resolve(SelfTrainSettings, path, ["selftrain"], {}), REGISTRIES)
    for stage in (*STAGES, "finetune"):
        resolve(TrainSettings, path, ["train", f"train.{stage}"], {})
    resolve(PolicySettings, path, ["train", "train.policy"], {})
    resolve(Sources, path, ["models", "data"], {})
