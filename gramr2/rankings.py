"""Lists of responses: which comparisons find the best one, or the full order, and what they come to.

The paper's linear search for the best and its divide and conquer (a knockout), its full ranking by repeated
selection and, ours, a merge sort. Each is a generator that stops where it needs answers, so that whatever
waits at the same time, in one list or in many, is one batch (`RewardModel.contests`).

A sort asks so little that it never contradicts itself. So a ranking ends with one batch more, of neighbours
and next neighbours that were not compared: a circle of three shows there, and is undone by ranked pairs.

It leaves out: how a comparison is answered (judge.py).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from gramr2.files import InputError, JsonRow
from gramr2.records import UNDECIDED, Judgment, mean_over_orders

METHODS = ("linear", "knockout", "merge", "selection")
BEST_METHODS = ("linear", "knockout")  # those that find the best without ranking the others

Result = TypeVar("Result")
Duel = tuple[int, int]  # (shown as A, shown as B)
Search = Generator[list[Duel], None, Result]  # yields the comparisons that it waits for


def preference(judgment: Judgment | InputError) -> float:
    """p that A is better: a number also where the orders disagree and `p_a` is 0.5; 0.5 after a failure.

    It is made from the votes, where there are any: a calibration enters for judges without votes only. It
    never contradicts what most votes say.
    """
    if isinstance(judgment, InputError):
        return UNDECIDED
    p = mean_over_orders(judgment.details, judgment.p_a)
    return p if judgment.label in (None, "A" if p > UNDECIDED else "B") else UNDECIDED


@dataclass(frozen=True)
class Ranking:
    """Indices of responses, best first; of a search for the best, that one alone."""

    order: list[int]
    rounds: int  # batches
    answers: dict[Duel, Judgment]
    overruled: list[tuple[int, int, float]]  # (i, j, p): i was preferred to j, which the order puts first

    @property
    def best(self) -> int | None:
        """None where no comparison has preferred anything: the first of the list is then only the first."""
        decided = not self.answers or any(answer.label for answer in self.answers.values())
        return self.order[0] if decided else None

    @property
    def comparisons(self) -> int:
        return len(self.answers)

    @property
    def undecided(self) -> int:
        return sum(answer.p_a == UNDECIDED for answer in self.answers.values())

    def to_json(self) -> JsonRow:
        """Every comparison, in the order in which they were made."""
        rows: list[dict[str, Any]] = [
            {"a": a, "b": b, "p": preference(each), **each.to_json()} for (a, b), each in self.answers.items()
        ]
        return {"order": self.order, "comparisons": rows}


class Contest:
    """One list of responses, and what was answered about it: a comparison is made once and serves both ways.

    Where there is no preference, the response that came first stays ahead.
    """

    def __init__(self, size: int):
        if not size:
            raise InputError("no responses to choose from")
        self.size, self.rounds = size, 0
        self.p: dict[Duel, float] = {}  # that the first one is better
        self.answers: dict[Duel, Judgment] = {}

    def add_answer(self, duel: Duel, judgment: Judgment) -> None:
        self.answers[duel] = judgment
        self.p[duel] = preference(judgment)
        self.p[duel[::-1]] = 1 - self.p[duel]

    def is_better(self, i: int, j: int) -> bool:
        return self.p[i, j] > UNDECIDED

    def search(self, method: str, full: bool) -> Search[Ranking]:
        """The search for the best, or the full ranking. What it waits for is answered by `add_answer`."""
        if method not in METHODS or not (full or method in BEST_METHODS):
            raise InputError(f"method {method}: give one of {', '.join(METHODS)}; best-of-n: the first two")
        order, rest = [], list(range(self.size))
        if method in BEST_METHODS:
            order = [(yield from self._linear(rest) if method == "linear" else self._knockout(rest))]
            rest.remove(order[0])
        if full:
            order += yield from self._selection(rest) if method == "selection" else self._merge_sort(rest)
            yield [(i, j) for place, i in enumerate(order) for j in order[place + 1 : place + 3]]
            order = self._ranked_pairs(order)
        ahead = {(i, j) for place, j in enumerate(order) for i in order[place + 1 :]}
        overruled = [(*duel, p) for duel, p in self.p.items() if p > UNDECIDED and duel in ahead]
        return Ranking(order, self.rounds, self.answers, overruled)

    def _linear(self, items: list[int]) -> Search[int]:
        """The paper's search: the best so far is response B, its challenger A."""
        best = items[0]
        for challenger in items[1:]:
            yield [(challenger, best)]
            best = challenger if self.is_better(challenger, best) else best
        return best

    def _knockout(self, items: list[int]) -> Search[int]:
        """The paper's divide and conquer: a round's duels are one batch; the odd one out goes on."""
        while len(items) > 1:
            duels = list(zip(items[::2], items[1::2], strict=False))
            yield duels
            items = [j if self.is_better(j, i) else i for i, j in duels] + items[2 * len(duels) :]
        return items[0]

    def _selection(self, items: list[int]) -> Search[list[int]]:
        """The paper's full ranking: the best, then the best of the others, and so on."""
        order: list[int] = []
        while len(order) < len(items):
            order.append((yield from self._linear([i for i in items if i not in order])))
        return order

    def _merge_sort(self, items: list[int]) -> Search[list[int]]:
        """From runs of one: the next comparison of every merge of a level is one batch."""
        runs = [[i] for i in items]
        while len(runs) > 1:
            merges: list[tuple[list[int], list[int], list[int]]]
            merges = [(left, right, []) for left, right in zip(runs[::2], runs[1::2], strict=False)]
            while unfinished := [merge for merge in merges if merge[0] and merge[1]]:
                yield [(left[0], right[0]) for left, right, _ in unfinished]
                for left, right, merged in unfinished:
                    merged.append((right if self.is_better(right[0], left[0]) else left).pop(0))
            runs = [merged + left + right for left, right, merged in merges] + runs[2 * len(merges) :]
        return runs[0] if runs else []

    def _ranked_pairs(self, order: list[int]) -> list[int]:
        """Tideman's rule: answers hold from the surest down, but for those that would close a circle."""
        below = {i: {i} for i in order}  # whom each is ahead of, itself among them
        for (i, j), p in sorted(self.p.items(), key=lambda answer: -answer[1]):
            if p > UNDECIDED and i not in below[j]:
                for k in order:
                    below[k] |= below[j] if i in below[k] else set()
        return sorted(order, key=lambda i: -len(below[i]))
