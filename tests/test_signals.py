"""What knows that a label is wrong: areas and shares worked out by hand, and a run's own table."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from checkpoints import random_model
from planted import TOKENIZER
from selfruns import finished_micro

from gramr2.extras.signals import area, lead, most_kept, weigh
from gramr2.files import read_json, read_rows
from gramr2.prompts import HIDDEN_LABEL, proof_opening
from gramr2.prover import Prover
from gramr2.records import Pair, Proof
from gramr2.scoring import logprobs, softmax_of
from gramr2.votes import THINK, Voter

PAIR = Pair((("user", "q"),), "six pears", "two", "A")
RIGHT = np.array([True, True, True, False])


def test_an_area_is_how_often_right_is_above_wrong_and_a_tie_is_half():
    of_right, of_wrong = np.array([3.0, 1.0, 2.0]), np.array([1.0, 2.0, -np.inf])
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(of_right, of_wrong)]
    assert area(of_right, of_wrong) == pytest.approx(np.mean(wins))
    found = weigh(np.array([0.9, 0.8, 0.7, 0.1]), RIGHT)
    assert (found["area"], found["low"], found["high"]) == (1, 1, 1)
    assert weigh(np.zeros(4), RIGHT)["area"] == 0.5


def test_a_threshold_keeps_equal_values_together_and_no_more_errors_than_asked():
    """Cut between equals, a filter would seem to keep 3 of 4 without an error."""
    assert most_kept(np.array([2.0, 1.0, 1.0, 1.0]), RIGHT, 0.05) == 25
    assert most_kept(np.array([2.0, 1.0, 1.0, 0.0]), RIGHT, 0.05) == 75
    assert most_kept(np.array([2.0, 1.0, 1.0, 0.0]), RIGHT, 0.25) == 100
    assert most_kept(np.array([0.0, 0.0, 0.0, 1.0]), RIGHT, 0.05) == 0  # the surest of all is wrong


def test_a_side_without_a_proof_has_lost():
    proof = Proof("id", "text", -3.0, score=-0.5)
    assert lead(proof, Proof("id", "text", -3.0, score=-0.75)) == 0.25
    assert (lead(proof, None), lead(None, proof), lead(None, None)) == (np.inf, -np.inf, 0)


def test_a_prover_that_is_not_told_the_label_is_asked_in_both_orders():
    """Asked in one, its liking for the first response would pass for an opinion."""
    prover = Prover(random_model("llama3"), TOKENIZER, "{question}|{response_a}|{response_b}|{label}")

    def p_first(a: str, b: str) -> float:
        front = prover.frame(f"q|{a}|{b}|{HIDDEN_LABEL}")
        tails = [TOKENIZER.encode(proof_opening(label)) for label in "AB"]
        scored = logprobs(prover.model, [[*front, *tail] for tail in tails])
        sums = [sum(each[-len(tail) :].tolist()) for each, tail in zip(scored, tails, strict=True)]
        return softmax_of(*sums)

    one, other = p_first("six pears", "two"), p_first("two", "six pears")
    assert one != pytest.approx(1 - other, abs=1e-3)  # this one likes a place
    found = prover.guess([PAIR, PAIR.swapped(), Pair((("user", "q " * 9000),), "x", "y", "A")])
    assert found == pytest.approx([(one + 1 - other) / 2, (other + 1 - one) / 2, 0.5], abs=1e-5)


def test_a_judge_reads_an_argument_in_the_place_of_its_own():
    voter = Voter(random_model("llama3"), TOKENIZER, "{question}|{response_a}|{response_b}", THINK)
    front = TOKENIZER.chat([{"role": "user", "content": "q|six pears|two"}])
    endings = [TOKENIZER.encode(f"<think>\nz\n</think>\n<answer>\n{letter}") for letter in "AB"]
    scored = logprobs(voter.model, [[*front, *ending] for ending in endings])
    assert voter.reading(PAIR, "z") == pytest.approx(
        softmax_of(*(float(each[-1]) for each in scored)), abs=1e-6
    )


def test_a_run_weighs_its_own_labels(tmp_path_factory):
    run = finished_micro(tmp_path_factory.getbasetemp())
    (place,) = run.glob("steps/*-round-1-signals")
    found = read_json(place / "done.json")["counts"]
    assert found == json.loads((run / "results.json").read_text())["signals"]["round 1"]
    assert set(found["signals"]) == {
        "share of votes", "agreement of orders", "softmax", "probability", "equation 5, both sides",
        "contrast of the proof", "rules, both sides", "judge reads the proof", "judge reads both proofs",
    }  # fmt: skip
    (data,), (judged,) = run.glob("steps/*-data"), run.glob("steps/*-round-1-predict")
    truth = {row["id"]: row["label"] for row in read_rows(data / "truth.jsonl")}
    rows = [row for row in read_rows(judged / "judged.jsonl") if row.get("label")]
    right = np.array([row["label"] == truth[row["id"]] for row in rows])
    assert (found["pairs"], found["wrong"]) == (len(rows), (~right).sum())
    share = np.array([row["votes"][row["label"]] / sum(row["votes"].values()) for row in rows])
    assert found["signals"]["share of votes"]["area"] == round(area(share[right], share[~right]), 4)
    for heading in ("What knows that a label is wrong: round 1", "kept at 5% wrong", "judge reads the proof"):
        assert heading in (run / "report.html").read_text()
