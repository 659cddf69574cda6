"""Equation (5), which picks one of a pair's k proofs to become its rationale, and scores to compare it with.

    Score = - log π_ψ(ẑ given s, l) / log π_ψ(ẑ)                                      equation (5)

The score lies in (-inf, 0] and higher is better: a proof ẑ is good when the condition makes it likely
(numerator near 0) while it would be unlikely to be written of just any pair (denominator far from 0). The
paper leaves open what exactly is scored; here:

- every token that the prover sampled counts, its stop token included, and nothing that was prefilled;
- both terms are untempered sums, without further normalisation by length;
- π(ẑ) is taken in the same chat frame with an exactly empty user turn: no task, no question, no label.
  Training drops the condition in a tenth of the examples (stages.py), so that this means something.

Scores rank the proofs of one pair. They are not compared across pairs. Another way to pick a proof is
another entry of `SCORES`.

It leaves out: how both log-probs are computed (prover.py; the denominator's in `Prover.second_terms`), which
proofs are well-formed (prover.py), and the rules that a chosen rationale must still pass (denoise.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gramr2.prompts import prover_prompt
from gramr2.records import OTHER, Pair, Proof


def empty_turn(pair: Pair, template: str) -> str:
    """Equation (5): a user turn with nothing in it."""
    return ""


def other_label(pair: Pair, template: str) -> str:
    """The same s with the other label."""
    return prover_prompt(replace(pair, label=OTHER[pair.label]), template)


def refuse_if_certain(given: float, second_term: float) -> str | None:
    """What is certain without a condition says nothing about this pair, and zero divides nothing."""
    return "certain without a condition" if second_term >= 0 else None


@dataclass(frozen=True)
class Score:
    """A way to rank the proofs of one pair; higher is better.

    `value` is computed from log π(ẑ | s, l) and a second term, which is log π(ẑ | another user turn):
    `condition` writes that turn for a pair, given the prover's template. `guard` is asked with the same two
    terms before they are divided, and its reason makes a proof not eligible.
    """

    value: Callable[[float, float], float]
    condition: Callable[[Pair, str], str]  # of the second term; for equation (5), of the denominator
    guard: Callable[[float, float], str | None] | None = refuse_if_certain


SCORES: dict[str, Score] = {
    # 0.0 - x: a certain numerator scores 0, not -0
    "equation-5": Score(lambda given, blank: 0.0 - given / blank, empty_turn),
    "numerator": Score(lambda given, blank: given, empty_turn, guard=None),
    "contrast": Score(lambda given, wrong: given - wrong, other_label, guard=None),
    # all k are drawn alike: the first eligible one is a random one
    "random": Score(lambda given, blank: 0.0, empty_turn, guard=None),
}


def with_score(proof: Proof, second_term: float, select_by: str = "equation-5") -> Proof:
    """A proof with its score, or with its guard's reason. π(ẑ) is written down wherever it was taken."""
    score = SCORES[select_by]
    blank = second_term if score.condition is empty_turn else None
    if score.guard and (reason := score.guard(proof.logp_given, second_term)):
        return replace(proof, logp_blank=blank, ineligible=reason)
    value = score.value(proof.logp_given, second_term)
    return replace(proof, logp_blank=blank, score=value, select_by=select_by)


def select(proofs: Sequence[Proof]) -> Proof | None:
    """The eligible proof with the highest score, the earliest among equals; None where there is none."""
    eligible = [proof for proof in proofs if proof.score is not None]
    return max(eligible, key=lambda proof: proof.score or 0.0, default=None)
