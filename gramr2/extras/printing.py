"""A judgment and a ranking, as a person reads them in a terminal.

It leaves out: tables of benchmarks (evaluate.py), and the end of a run (results.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gramr2.files import JsonRow
from gramr2.rankings import Ranking
from gramr2.records import Pair, show


def judgment_text(pair: Pair, judgment: JsonRow) -> str:
    label, votes, sure = judgment["label"], judgment["votes"], max(judgment["p_a"], 1 - judgment["p_a"])
    if pair.response_a == pair.response_b:
        lines = ["No preference: the two responses are identical."]
    elif label is None:
        why = "the votes are tied" if votes["A"] + votes["B"] else "none of the answers could be read"
        lines = [f"No verdict: {why if sum(votes.values()) else 'the two scores are equal'}."]
    elif judgment["orders_agree"] is False:
        lines = [f"Leaning to {label}, but the verdict changes with the order: no clear preference."]
    else:
        lines = [f"Response {label} is better (probability {sure:.2f})"]
    if sum(votes.values()):
        lines.append(f"votes: {votes['A']} for A, {votes['B']} for B, {votes['none']} unreadable")
    if judgment["rationale"]:
        lines += ["", show(judgment["rationale"])]
    return "\n".join(lines)


def ranking_lines(ranking: Ranking, responses: Sequence[str]) -> Iterator[str]:
    yield f"The best is response {ranking.best + 1}."
    for place, index in enumerate(ranking.order, 1):
        yield f"{place:4}. response {index + 1}: {' '.join(responses[index].split())[:80]}"
    counts = f"{ranking.comparisons} comparisons in {ranking.rounds} batches, {ranking.undecided}"
    yield f"{counts} without a preference"
    for i, j, p in ranking.overruled:
        yield f"intransitive: {i + 1} was preferred to {j + 1} (p {p:.2f}), which surer answers overrule"
