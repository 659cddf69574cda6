"""The plan of a run: either letter as often as the other, and packs that lose nothing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gramr2.plan import Plan, split_into_packs
from gramr2.records import Example, Tokens


@given(n=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_either_letter_is_right_in_half_of_an_epoch_and_turns_in_the_next(n, batch, seed):
    """A judge that sees the better answer more often as A learns the letter."""
    plan = Plan(np.arange(n) * 2, np.ones(n), np.ones(n), {}, batch, 2 * n, seed)
    seen = [chosen for step in range(plan.steps) for chosen in plan.step(step)]
    first, second = ({i: letter for i, e, letter in seen if e == epoch} for epoch in (0, 1))
    assert len(seen) == 2 * n and first.keys() == second.keys() == set(range(0, 2 * n, 2))
    assert abs(sum(letter == "A" for letter in first.values()) - n / 2) <= 0.5
    assert all(first[i] != second[i] for i in first)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5), st.integers(50, 120))
@settings(max_examples=80, deadline=None)
def test_splitting_keeps_every_row_within_the_budget_and_gives_ranks_as_many_packs(lengths, ranks, budget):
    """A lost row changes the loss, an overfull pack the memory; unequal counts would hang the ranks."""
    examples = [Example((Tokens(tuple(range(n)), 0),), margin=float(i)) for i, n in enumerate(lengths)]
    packs_of_ranks = split_into_packs(examples, ranks, budget)
    assert len({len(packs) for packs in packs_of_ranks}) == 1
    packs = [pack for of_rank in packs_of_ranks for pack in of_rank]
    assert all(sum(example.length for example in pack) <= budget for pack in packs)
    assert sorted(example.margin for pack in packs for example in pack) == list(range(len(lengths)))
