"""Settings: flags of every kind, values out of range, and what a run may not go on with."""

import argparse
from dataclasses import dataclass

import pytest

from gramr2.commands.selftrain import REGISTRIES
from gramr2.denoise import FILTERS
from gramr2.files import InputError
from gramr2.recipes import resolve
from gramr2.settings import (
    SelfTrainSettings,
    TrainSettings,
    add_flags,
    check_identity,
    check_names,
    given,
    setting,
)


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


def test_flags_of_every_kind():
    assert parse() == {}
    assert parse("--flag") == {"flag": True} == parse("--flag", "true")
    assert parse("--no-flag") == {"flag": False} == parse("--flag", "false")
    assert parse("--names", "a", "b") == parse("--names", "a", "--names", "b") == {"names": ["a", "b"]}
    assert resolve(Some, None, [], parse("--names", "a")).names == ("a",)


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
    path = tmp_path / "recipe.toml"
    path.write_text("[selftrain]\nconfidence = 1\n")
    assert resolve(SelfTrainSettings, path, ["selftrain"], {}).confidence == (1.0,)
    settings = resolve(SelfTrainSettings, path, ["selftrain"], {"confidence": [0.75, 0.8]})
    assert [settings.filters(number).confidence for number in (1, 2, 3)] == [0.75, 0.8, 0.8]
    for value, message in [
        ([], "confidence"),
        ([0.5, 1.5], "confidence: expected a number from 0 to 1, got 1.5"),
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


def test_another_run_is_refused_and_every_difference_named(tmp_path):
    found, now = {"lr": "0.1", "seed": "0", "stage": "reward"}, {"lr": "0.2", "seed": "0", "limit": "5"}
    check_identity(found, found, tmp_path)
    names = r"lr \(0.1, now 0.2\), stage \(reward, now None\), limit \(None, now 5\); name another --name"
    with pytest.raises(InputError, match=names):
        check_identity(found, now, tmp_path, "--name")
