"""A judgment and a ranking, as a person reads them in a terminal.

It leaves out: tables of benchmarks (evaluate.py), and the end of a run (results.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from gramr2.files import JsonRow, as_started, visible
from gramr2.rankings import Ranking
from gramr2.records import UNDECIDED, Pair

EXCERPT = 150  # characters of an unreadable answer that are shown
UNTRAINED = (
    "  What to do: ask for the letter alone, which any model can give (--format label); give answers\n"
    "  that were cut more room (--max-new-tokens); or train the model to judge:\n"
    "  python train.py --stage reward --model DIR --data PAIRS-WITH-RATIONALES.jsonl"
)


def judgment_text(pair: Pair, judgment: JsonRow) -> str:
    label, votes, sure = judgment["label"], judgment["votes"], max(judgment["p_a"], 1 - judgment["p_a"])
    if pair.response_a == pair.response_b:
        lines = ["No preference: the two responses are identical."]
    elif label is None:
        why = "the votes are tied" if votes["A"] + votes["B"] else "none of the answers could be read"
        lines = [f"No verdict: {why if sum(votes.values()) else 'the two scores are equal'}."]
    elif judgment["p_a"] == UNDECIDED:
        why = "the verdict changes with the order" if judgment["orders_agree"] is False else "it is not sure"
        lines = [f"Leaning to {label}, but {why}: no clear preference."]
    else:
        lines = [f"Response {label} is better (probability {sure:.2f})"]
    if sum(votes.values()):
        lines.append(f"votes: {votes['A']} for A, {votes['B']} for B, {votes['none']} unreadable")
    lines += unread_lines(judgment["details"], judgment["judge"]["format"])
    lines += forged_lines([judgment["forged"]])
    if judgment["rationale"]:
        lines += ["", judgment["rationale"]]
    return visible("\n".join(lines))


def forged_lines(forged: Iterable[Sequence[str]]) -> Iterator[str]:
    if where := ", ".join(sorted({name for each in forged for name in each})):
        yield f"warning: {where}: holds a line of the judge's own prompt, and may speak in its name"


def unread_lines(votes: Sequence[JsonRow], format: str) -> Iterator[str]:
    """Why votes could not be read, how often, and one of each kind; and what to do where none could."""
    unread: dict[str, list[str]] = {}
    for vote in votes:
        if vote["label"] is None:
            unread.setdefault(vote["reason"], []).append(vote["text"])
    for reason, texts in unread.items():
        text = excerpt(texts[0])
        yield f"  {len(texts)} unreadable: {reason}" + (f"; one reads “{text}”" if text else "")
    if unread and format != "label" and all(vote["label"] is None for vote in votes):
        yield as_started(UNTRAINED)


def excerpt(text: str) -> str:
    """On one line, and without its middle where it is long."""
    line = " ".join(text.split())
    half = EXCERPT // 2
    return line if len(line) <= EXCERPT else f"{line[:half].rstrip()} […] {line[-half:].lstrip()}"


def ranking_row(ranking: Ranking) -> JsonRow:
    """What a ranking comes to, without its comparisons."""
    names = ("best", "order", "comparisons", "rounds", "undecided", "overruled")
    return {name: getattr(ranking, name) for name in names}


def ranking_lines(ranking: Ranking, responses: Sequence[str], format: str) -> Iterator[str]:
    if ranking.best is None:
        yield "No winner: no comparison came to a verdict. The responses stand in the order given."
    else:
        yield f"The best is response {ranking.best + 1}."
    for place, index in enumerate(ranking.order, 1):
        yield visible(f"{place:4}. response {index + 1}: {' '.join(responses[index].split())[:80]}")
    counts = f"{ranking.comparisons} comparisons in {ranking.rounds} batches, {ranking.undecided}"
    yield f"{counts} without a preference"
    yield from forged_lines(each.forged for each in ranking.answers.values())
    votes = (asdict(vote) for each in ranking.answers.values() for vote in each.details)
    yield from map(visible, unread_lines(list(votes), format))
    for i, j, p in ranking.overruled:
        yield f"intransitive: {i + 1} was preferred to {j + 1} (p {p:.2f}), which surer answers overrule"
