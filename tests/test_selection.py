"""Equation (5) and the other scores, by hand: what is picked, and what no score can be computed of."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gramr2.prompts import prover_prompt
from gramr2.records import Pair, Proof
from gramr2.selection import SCORES, Score, select, with_score


def picked(select_by, *sums):
    """The number of the proof that is picked of those with these (log π(ẑ | s, l), second term)."""
    proofs = [
        with_score(Proof("p", str(n), given), second, select_by) for n, (given, second) in enumerate(sums)
    ]
    assert all(proof.select_by == select_by and proof.ineligible is None for proof in proofs)
    return int(select(proofs).text)


def test_a_generic_proof_loses_to_a_specific_one():
    """The generic one is likelier given the pair, and as likely without it: its numerator alone would win."""
    generic, specific = (-5.0, -6.0), (-10.0, -60.0)
    assert with_score(Proof("p", "", generic[0]), generic[1]).score == pytest.approx(-5 / 6)
    assert with_score(Proof("p", "", specific[0]), specific[1]).score == pytest.approx(-1 / 6)
    assert picked("equation-5", generic, specific) == 1
    assert picked("numerator", generic, specific) == 0


def test_each_score_picks_its_own():
    """The contrast is a difference: as a ratio it would pick the first here."""
    sums = [(-1.0, -9.0), (-0.5, -1.0), (-2.0, -12.0)]
    assert {name: picked(name, *sums) for name in SCORES} == {
        "equation-5": 0, "numerator": 1, "contrast": 2, "random": 0,
    }  # fmt: skip


def test_a_random_proof_is_the_first_eligible_one():
    """The k proofs are drawn alike, so that the first needs no further draw. Only the eligible count."""
    malformed = Proof("p", "no proof", -1.0, ineligible="malformed")
    one, two = (with_score(Proof("p", text, -9.0), -9.0, "random") for text in ("one", "two"))
    assert select([malformed, one, two]) is one
    assert select([malformed]) is None and select([]) is None


def test_a_proof_that_is_certain_without_a_condition_is_not_eligible():
    """The denominator is zero there: the score would be infinite, or not a number."""
    certain = Proof("p", "", -3.0)
    refused = with_score(certain, 0.0)
    assert (refused.ineligible, refused.score) == ("certain without a condition", None)
    assert refused.logp_blank == 0.0 and select([refused]) is None
    for name in ("numerator", "contrast", "random"):
        assert with_score(certain, 0.0, name).ineligible is None


def test_another_denominator_is_one_entry_and_divides_by_no_zero(monkeypatch):
    """A guard that had to be thought of would be forgotten, and a run would end in a traceback."""

    def hidden(pair, template):
        return prover_prompt(pair, template, hide_label=True)

    monkeypatch.setitem(SCORES, "hidden", Score(lambda given, second: 0.0 - given / second, hidden))
    assert with_score(Proof("p", "", -1.0), 0.0, "hidden").ineligible == "certain without a condition"
    scored = with_score(Proof("p", "", -1.0), -4.0, "hidden")
    assert (scored.score, scored.select_by) == (-0.25, "hidden")
    assert scored.logp_blank is None  # that is π(ẑ) in the empty frame, which was not taken


def test_the_second_terms_see_nothing_the_other_label_or_nothing():
    """One word of s or l in the denominator's condition would let it see what it must not."""
    pair = Pair((("user", "which?"),), "six", "two", "A")
    template = "{question}|{response_a}|{response_b}|{label}"
    turns = {name: score.condition(pair, template) for name, score in SCORES.items()}
    assert turns == {"equation-5": "", "numerator": "", "contrast": "which?|six|two|B", "random": ""}


@hypothesis_settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e4, 0), st.floats(-1e4, -1e-4)), min_size=1, max_size=8))
def test_scores_are_at_most_zero_and_the_best_is_picked_the_earliest_among_equals(sums):
    """A score above zero, or -0.0 below 0.0 in a file, would not be the paper's."""
    proofs = [with_score(Proof("p", str(n), given), blank) for n, (given, blank) in enumerate(sums)]
    scores = [proof.score for proof in proofs]
    assert all(-math.inf < score <= 0 and str(score) != "-0.0" for score in scores)
    assert [score * blank for score, (_, blank) in zip(scores, sums, strict=True)] == pytest.approx(
        [-given for given, _ in sums]
    )
    best = select(proofs + [dataclasses.replace(proof, text="later") for proof in proofs])
    assert best is proofs[scores.index(max(scores))]
