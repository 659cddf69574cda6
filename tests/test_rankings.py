"""Rankings: known orders are found with the stated comparisons, circles are undone and reported."""

import itertools
import math
import random

import pytest
from planted import answering

from gramr2.files import InputError
from gramr2.rankings import METHODS


def known_order(a: str, b: str) -> float:
    return 0.9 if int(a) > int(b) else 0.1


def merge_comparisons(items: list[int]) -> int:
    """A plain bottom-up merge sort's comparisons, counted."""
    runs, count = [[i] for i in items], 0
    while len(runs) > 1:
        merged = []
        for left, right in itertools.zip_longest(runs[::2], runs[1::2], fillvalue=[]):
            left, right, out = list(left), list(right), []
            while left and right:
                count += 1
                out.append((right if right[0] > left[0] else left).pop(0))
            merged.append(out + left + right)
        runs = merged
    return count


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_every_method_recovers_a_known_order_with_the_stated_comparisons(n):
    for shuffle in range(4):
        quality = random.Random(shuffle).sample(range(n), n)
        responses, expected = [str(q) for q in quality], sorted(range(n), key=lambda i: -quality[i])
        for method in METHODS:
            judge = answering(known_order)
            ranking = judge.rank("q", responses, method)
            asked = [frozenset(duel) for batch in judge.asked for duel in batch]
            assert ranking.order == expected and not ranking.overruled
            assert ranking.comparisons == len(asked) == len(set(asked)) and ranking.rounds == len(judge.asked)
            if method == "merge":
                sort = merge_comparisons(quality)
                assert sort <= ranking.comparisons <= sort + max(0, n - 2)
            assert ranking.comparisons <= n * (n - 1) // 2
        for method, rounds in (("linear", n - 1), ("knockout", math.ceil(math.log2(n)))):
            judge = answering(known_order)
            best = judge.best_of("q", responses, method)
            assert best.best == expected[0] and best.comparisons == n - 1 and best.rounds == rounds


def test_the_incumbent_is_shown_as_b_and_its_challenger_as_a():
    judge = answering(lambda a, b: 0.5)
    found = judge.best_of("q", ["x", "y", "z"])  # without a preference the first stays, and is not named
    assert found.best is None and found.order == [0]
    assert judge.asked == [[("y", "x")], [("z", "x")]]


@pytest.mark.parametrize("method", METHODS)
def test_a_circle_is_resolved_by_the_surest_answers_and_reported(method):
    p = {("x", "y"): 0.9, ("y", "z"): 0.8, ("z", "x"): 0.6}
    judge = answering(lambda a, b: p.get((a, b)) or 1 - p[b, a])
    ranking = judge.rank("q", ["x", "y", "z"], method)
    assert ranking.order == [0, 1, 2] and ranking.comparisons == 3
    assert [(i, j) for i, j, _ in ranking.overruled] == [(2, 0)]
    assert ranking.overruled[0][2] == pytest.approx(0.6)


def test_lists_share_their_batches_and_one_that_fails_stops_alone():
    judge = answering(known_order)
    one, two = judge.contests([("q", list("3142")), ("r", list("12345678"))], "knockout", full=False)
    assert (one.best, two.best) == (2, 7) and [len(batch) for batch in judge.asked] == [2 + 4, 1 + 2, 1]
    whole = judge.judge_many

    def failing(pairs, *arguments, **options):
        for each, judgment in whole(pairs, *arguments, **options):
            yield each, InputError("too long") if "9" in each.response_a + each.response_b else judgment

    judge.judge_many = failing
    bad, good = judge.contests([("q", list("129")), ("r", list("123"))], "merge")
    assert isinstance(bad, InputError) and good.order == [2, 1, 0]
    with pytest.raises(InputError, match="too long"):
        judge.rank("q", list("129"))
    with pytest.raises(InputError, match="no responses"):
        judge.rank("q", [])
    with pytest.raises(InputError, match="best-of-n"):
        judge.best_of("q", ["1", "2"], "merge")
