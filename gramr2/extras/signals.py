"""What knows that a pseudo-label is wrong? Signals weighed by the truth: a step of a run that only measures.

A filter of labels is worth what its signal is: a number that should be higher where a label is right. Some
come with the judge's votes; some ask the prover, for proofs of both sides or for its own opinion; one asks
the judge again, to read a proof. Of pairs whose truth is known each signal's area under the ROC curve is
taken (0.5: it knows nothing), and how many of the pairs a filter by it could keep, with the errors left among
them at most 5% or 10%: with a threshold that only the truth can set, so that it is the best of all filters.

It leaves out: filtering itself (denoise.py). The truth stops here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from gramr2 import denoise
from gramr2.data import Store
from gramr2.files import InputError, JsonRow
from gramr2.judge import RewardModel
from gramr2.prompts import HIDDEN_LABEL, parse_rationale
from gramr2.prover import Prover, as_rationale
from gramr2.records import OTHER, UNDECIDED, Judgment, Pair, Proof, show
from gramr2.selection import SCORES, select
from gramr2.steps import Run
from gramr2.votes import Voter

ERRORS = 0.05, 0.1  # shares of wrong labels among what is kept
RESAMPLES = 1000
Values = dict[str, list[float]]  # of each signal, in the order of the pairs


@dataclass(frozen=True)
class Labelled:
    """A pair with its pseudo-label, the judgment that gave it, and whether it is right."""

    pair: Pair
    judgment: Judgment
    right: bool


def weigh_signals(
    run: Run, name: str, prover: Path, judge: Path, judged: Path, truth: dict[str, str]
) -> None:
    """The step. Without a truth that knows right from wrong there is nothing to weigh, and it says so."""
    with run.directory.step(name) as step:
        if step.to_do:
            step.close(run.ranks.on_rank_0(lambda: measure(run, prover, judge, judged, truth)))
    found = run.directory.counts[name]
    if not found["signals"]:
        run.directory.say(
            f"signals of wrong labels: not weighed: of {found['pairs']} pairs whose truth is known "
            f"{found['wrong']} have a wrong label"
        )


def measure(run: Run, prover: Path, judge: Path, judged: Path, truth: dict[str, str]) -> JsonRow:
    labelled = list(islice(of_known_truth(judged, truth), run.settings.signals))
    right = np.array([each.right for each in labelled], dtype=bool)
    counts: JsonRow = {"pairs": len(labelled), "wrong": int((~right).sum()), "signals": {}}
    if 0 < counts["wrong"] < counts["pairs"]:
        pairs = [each.pair for each in labelled]
        values = of_votes([each.judgment for each in labelled])
        of_prover, best = of_proofs(run, run.load(Prover, prover), pairs)
        values |= of_prover | of_readings(run.load(RewardModel, judge), pairs, best)
        counts["signals"] = {name: weigh(np.array(each), right) for name, each in values.items()}
    return counts


def of_known_truth(judged: Path, truth: dict[str, str]) -> Iterator[Labelled]:
    for row in Store(judged):
        label = row.get("label")
        if label and truth.get(row["id"]):
            pair = dataclasses.replace(Pair.from_json(row["pair"]), label=label, rationale=None)
            yield Labelled(pair, Judgment.from_row(row), label == truth[row["id"]])


# ---------------------------------------------------------------------------------- the signals


def of_votes(judgments: Sequence[Judgment]) -> Values:
    """What the judge's own votes say, as the label filters read them (denoise.py)."""
    return {
        "share of votes": [denoise.share_of_votes(each) for each in judgments],
        "agreement of orders": [float(bool(each.orders_agree)) for each in judgments],
        "softmax": [denoise.mean_softmax(each) for each in judgments],
        "probability": [abs(each.p_a - UNDECIDED) for each in judgments],
    }


def of_proofs(
    run: Run, prover: Prover, pairs: Sequence[Pair]
) -> tuple[Values, dict[str, list[Proof | None]]]:
    """What the prover says of labels: by proofs of both sides, k of each, and unasked for any."""
    sides = {"label": list(pairs), "other": [dataclasses.replace(p, label=OTHER[p.label]) for p in pairs]}
    proving = run.proving | {"select_by": "equation-5"}
    best = {
        side: [select(proofs) for _, proofs in prover.prove_many(asked, run.settings.k, **proving)]
        for side, asked in sides.items()
    }
    passed = {
        side: [passes(run, prover, *each) for each in zip(asked, best[side], strict=True)]
        for side, asked in sides.items()
    }
    both = list(zip(*best.values(), strict=True))
    found = {
        "equation 5, both sides": [lead(one, other) for one, other in both],
        "contrast of the proof": contrasts(prover, pairs, best["label"]),
        "rules, both sides": [float(one) - float(other) for one, other in zip(*passed.values(), strict=True)],
    }
    if can_say(prover, HIDDEN_LABEL):
        guessed = zip(pairs, prover.guess(pairs), strict=True)
        found["prover, not told the label"] = [for_label(pair, p_a) for pair, p_a in guessed]
    return found, best


def can_say(prover: Prover, word: str) -> bool:
    """The toy's tokenizer has the words of its shop and no others."""
    try:
        return bool(prover.tokenizer.encode(f" {word}"))
    except InputError:
        return False


def of_readings(judge: RewardModel, pairs: Sequence[Pair], best: dict[str, list[Proof | None]]) -> Values:
    """The judge's verdict behind a proof's argument, without its conclusion: of the label's, and of both."""
    voter = judge.voter
    assert isinstance(voter, Voter), "the loop's judges write"
    read = {
        side: [verdict_behind(voter, *each) for each in zip(pairs, proofs, strict=True)]
        for side, proofs in best.items()
    }
    means = [sum(each) / 2 for each in zip(*read.values(), strict=True)]
    return {"judge reads the proof": read["label"], "judge reads both proofs": means}


def lead(one: Proof | None, other: Proof | None) -> float:
    """How far the one's score is ahead; a side without an eligible proof has lost."""
    a, b = (-math.inf if proof is None or proof.score is None else proof.score for proof in (one, other))
    return 0.0 if a == b else a - b


def contrasts(prover: Prover, pairs: Sequence[Pair], proofs: Sequence[Proof | None]) -> list[float]:
    """log π(ẑ | s, l) - log π(ẑ | s, the other label); a pair without a proof has the lowest."""
    proved = [(pair, proof) for pair, proof in zip(pairs, proofs, strict=True) if proof]
    terms = iter(prover.second_terms(proved, "contrast"))
    value = SCORES["contrast"].value
    return [value(proof.logp_given, next(terms)) if proof else -math.inf for proof in proofs]


def passes(run: Run, prover: Prover, pair: Pair, proof: Proof | None) -> bool:
    settings = run.settings.filters()
    return proof is not None and not denoise.objection(
        pair, as_rationale(proof, prover.thinking_open), run.rationale_rules, settings
    )


def verdict_behind(voter: Voter, pair: Pair, proof: Proof | None) -> float:
    """The judge's probability of the label, given what the proof argues: the mean over both orders, where the
    text may be turned; one half where there is none."""
    if proof is None:
        return UNDECIDED
    given = dataclasses.replace(pair, rationale=as_rationale(proof, voter.thinking_open))
    found = [
        UNDECIDED if p_a is None else for_label(shown, p_a)
        for shown in ((given, given.swapped()) if given.swappable else (given,))
        for p_a in [voter.reading(shown, argument(shown.rationale or ""))]
    ]
    return sum(found) / len(found)


def argument(rationale: str) -> str:
    """A rationale, as stored, the way that it is shown, without its conclusion."""
    reading = parse_rationale(show(rationale)).rationale
    assert reading, "eligible proofs can be read"
    return f"Feedback:\n{reading.feedback}\n\nComparison:\n{reading.comparison}"


def for_label(pair: Pair, p_a: float) -> float:
    return p_a if pair.label == "A" else 1 - p_a


# ---------------------------------------------------------------------------------- what they are worth


def weigh(values: np.ndarray, right: np.ndarray) -> JsonRow:
    """A signal's area under the ROC curve with its interval, and what a filter by it could keep, per cent."""
    rng, groups = np.random.default_rng(0), (values[right], values[~right])
    drawn = [area(*(rng.choice(group, len(group)) for group in groups)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    figures = {"area": area(*groups), "low": float(low), "high": float(high)}
    kept = {f"kept at {errors:.0%}": most_kept(values, right, errors) for errors in ERRORS}
    return {name: round(value, 4) for name, value in figures.items()} | kept


def area(of_right: np.ndarray, of_wrong: np.ndarray) -> float:
    """How often a right label has a higher value than a wrong one, of all pairs of the two; a tie is half."""
    of_wrong = np.sort(of_wrong)
    below, not_above = (np.searchsorted(of_wrong, of_right, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(of_wrong))


def most_kept(values: np.ndarray, right: np.ndarray, errors: float) -> float:
    """The largest share of all pairs that a threshold keeps with at most so many errors among them."""
    order = np.argsort(-values, kind="stable")
    count, wrong = np.arange(1, len(order) + 1), np.cumsum(~right[order])
    ends = np.append(values[order][1:] != values[order][:-1], True)  # equal values stay together
    fine = count[ends & (wrong <= errors * count)]
    return round(100 * float(fine.max()) / len(order), 1) if len(fine) else 0.0
