"""Settings: flags of every kind, values out of range, and what a run may not go on with."""

import argparse
from dataclasses import dataclass

import pytest

from gramr2.files import InputError
from gramr2.recipes import resolve
from gramr2.settings import TrainSettings, add_flags, check_identity, given, setting


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


def test_another_run_is_refused_and_every_difference_named(tmp_path):
    found, now = {"lr": "0.1", "seed": "0", "stage": "reward"}, {"lr": "0.2", "seed": "0", "limit": "5"}
    check_identity(found, found, tmp_path)
    names = r"lr \(0.1, now 0.2\), stage \(reward, now None\), limit \(None, now 5\); name another --name"
    with pytest.raises(InputError, match=names):
        check_identity(found, now, tmp_path, "--name")
