"""The study's arithmetic: paired differences, their intervals, and arms that change what they say."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402

from gramr2.commands import selftrain  # noqa: E402
from gramr2.files import write_rows  # noqa: E402
from gramr2.records import Pair, show, swap  # noqa: E402
from gramr2.settings import SelfTrainSettings, check_names  # noqa: E402


def test_a_difference_is_paired_and_counts_the_seeds_it_holds_on():
    """Two arms that err on the same pairs differ surely; unpaired, noise would hide it."""
    rng = np.random.default_rng(0)
    easy = {seed: (rng.random(400) < 0.5).astype(float) for seed in (1, 2, 3)}
    better = {seed: np.where(np.arange(400) % 20 == 0, 1.0, values) for seed, values in easy.items()}
    figures = study.compare({"one": better, "other": easy}, "one", "other")
    expected = 100 * np.mean([(better[s] - easy[s]).mean() for s in easy])
    assert figures["mean"] == pytest.approx(expected, abs=0.01) and figures["seeds"] == 3
    assert 0 < figures["interval"][0] < figures["mean"] < figures["interval"][1] < 6
    assert figures["above zero"] == 3 and figures["below zero"] == 0
    turned = study.compare({"one": easy, "other": better}, "one", "other")
    assert turned["mean"] == -figures["mean"] and turned["below zero"] == 3


def test_arms_are_compared_on_the_seeds_that_both_have():
    ones = {seed: np.ones(10) for seed in (1, 2)}
    assert study.compare({"one": ones, "other": {2: np.zeros(10)}}, "one", "other")["by seed"].keys() == {"2"}
    assert study.compare({"one": ones, "other": {}}, "one", "other") is None


def test_the_mean_counts_a_seed_once_however_many_pairs_it_has():
    figures = study.mean_with_interval([np.ones(10), np.zeros(1000)])
    assert figures["mean"] == 50 and figures["interval"] == [0, 100]


def test_a_seed_begins_its_run_where_the_study_reads_it(tmp_path, monkeypatch):
    """Not by a name with slashes, which the command refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selftrain, "run_to_the_end", lambda *_: None)
    seed = study.Seed(3, ROOT / "recipes/micro.toml")
    seed.main()
    assert seed.step("world").is_dir() and seed.step("world").parents[1] == seed.place / "main"


def test_a_claim_names_rows_that_exist():
    rows = {*study.MAIN, *study.LENGTHS, *study.LOOPS, *study.SINGLES}
    assert {row for _, one, other in study.CLAIMS for row in (one, other)} <= rows
    for arm, loop in study.LOOPS.items():
        changed = replace(SelfTrainSettings(), **(loop.changes or {}))
        check_names(changed, selftrain.REGISTRIES)  # refused by name where a filter is gone
        assert any(arm in claim for claim in study.CLAIMS), f"{arm} is run and compared with nothing"


def test_the_judges_own_rationale_turns_with_its_pair(tmp_path):
    """Balanced pairs are exchanged after judging: a rationale that stayed would praise the other response."""
    text = "Feedback:\nResponse ⟦A⟧ is right.\n\nComparison:\nx\n\nConclusion:\nResponse ⟦A⟧ is better."
    pair = Pair((("user", "q"),), "yes", "no", label="A")
    row = {"label": "A", "rationale": text, "pair": replace(pair, label=None).to_json()}
    own = study.OwnRationales.__new__(study.OwnRationales)
    shown = row | {"rationale": show(text)}  # as judges' rows have it since they are read by others
    cases = (pair, text, row), (pair, text, shown), (pair.swapped(), swap(text), shown)
    for asked, expected, judged in cases:
        made = own._own(asked, judged)
        assert made["pair"]["label"] == asked.label and made["rationale"] == expected
        assert made["pair"]["response_a"] == asked.response_a
    write_rows(tmp_path / "x.jsonl", [made])
    assert "Response B is better" in show(made["rationale"])
