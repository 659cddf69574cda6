"""Wrong-label coherence: how well a prover argues for what is wrong, as a step of a run that only measures.

A prover that reasons gives itself away when it is asked for the wrong label; one that praises whatever it is
told to hides the judge's mistakes from the rules on rationales, and only the votes stand against them. Both
look alike on right labels. So it is asked for both, of pairs that it was not trained on.

It leaves out: what to do about it (`hide_label` of the prover's training).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from gramr2 import denoise
from gramr2.data import Store
from gramr2.files import JsonRow
from gramr2.prover import Prover, as_rationale
from gramr2.records import OTHER, Pair
from gramr2.steps import Run

# Proofs of wrong labels that pass every rule, as a share of those of right ones: above it, a note.
DECEPTIVE = 0.5


def ask_wrong_labels(run: Run, name: str, prover: Path, pairs: Path) -> None:
    """The step: how many proofs pass every rule, of the right labels and of the wrong ones."""
    with run.directory.step(name) as step:
        if step.to_do:
            step.close(run.ranks.on_rank_0(lambda: measure(run, prover, pairs)))
    counts = run.directory.counts[name]
    right, wrong = (counts[key]["passed"] / max(1, counts[key]["asked"]) for key in ("right", "wrong"))
    run.directory.say(
        f"proofs that pass every rule: {right:.0%} for the right label, {wrong:.0%} for the wrong one"
    )
    if wrong > DECEPTIVE * right and "coherence" not in run.settings.without:
        run.directory.say(
            "note: it argues for wrong labels too: the rules on rationales will let most wrong "
            "pseudo-labels through, and only the votes stand against them; [train.prover] hide_label in "
            "the recipe may help"
        )


def measure(run: Run, prover: Path, pairs: Path) -> JsonRow:
    rules, settings = run.rationale_rules, run.settings.filters()
    objection = partial(denoise.objection, rules=rules, settings=settings)
    held_out = Store(pairs, Pair.from_json)
    return label_coherence(run.load(Prover, prover), held_out, objection, **run.proving)


def label_coherence(
    prover: Prover, pairs: Iterable[Pair], objection: Callable[[Pair, str], str | None], **sampling: Any
) -> dict[str, JsonRow]:
    """How often a proof of the right label passes every rule, and how often one of the wrong label does.

    `pairs` is read twice; they have labels and were not trained on. `objection` is all rules together: the
    first reason against a rationale, or None. `sampling` goes to `prove_many`, one proof for each pair.
    Returns, under "right" and under "wrong", {"asked": n, "passed": n, "dropped": {reason: n}}. Where "wrong"
    passes nearly as often as "right", rules cannot tell a wrong pseudo-label by its proof: only the label
    filters keep it out.
    """
    counts = {}
    for name, turned in (("right", {label: label for label in OTHER}), ("wrong", OTHER)):
        asked = (dataclasses.replace(pair, label=turned[pair.label], rationale=None) for pair in pairs)
        reasons: list[str | None] = []
        for pair, proofs in prover.prove_many(asked, 1, **sampling):
            failed = proofs[0].ineligible if proofs else "too long to prove"
            reasons.append(failed or objection(pair, as_rationale(proofs[0], prover.thinking_open)))
        dropped = dict(Counter(filter(None, reasons)))
        counts[name] = {"asked": len(reasons), "passed": reasons.count(None), "dropped": dropped}
    return counts
