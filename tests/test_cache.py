"""The page pool: no page leaks, none is written while shared, a name never points at other content."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gramr2.cache import OutOfPages, PagePool, PageTable

SIZE = 4
operations = st.lists(
    st.tuples(st.sampled_from(["begin", "grow", "fork", "release"]), st.integers(0, 7), st.integers(1, 9)),
    max_size=60,
)


class Model:
    """What stands in every page, kept the slow way: a list of tokens per page, written token by token."""

    def __init__(self, pages: int):
        self.pool = PagePool(pages, SIZE)
        self.content: dict[int, list[int]] = {}
        self.tables: list[tuple[PageTable, list[int]]] = []

    def grow(self, table: PageTable, ids: list[int], more: list[int]) -> None:
        start = table.length
        try:
            growth = self.pool.extend(table, len(more))
        except OutOfPages:
            assert self.pool.needs(table, len(more)) > self.pool.free
            return
        for page in growth.fresh:
            self.content[page] = []
        for origin, copy in growth.copies:
            self.content[copy] = list(self.content[origin])
        for offset, token in enumerate(more):
            page = table.pages[(start + offset) // SIZE]
            assert self.pool.ref_counts[page] == 1, "written while shared"
            assert len(self.content[page]) == (start + offset) % SIZE
            self.content[page].append(token)
        ids += more
        self.pool.name(table, ids)

    def check(self) -> None:
        held = [b for table, _ in self.tables for b in table.pages]
        assert all(self.pool.ref_counts[b] == held.count(b) for b in range(1, len(self.pool.ref_counts)))
        assert self.pool.used == len(set(held)), "a page leaked, or was given to two"
        assert 0 not in held
        for table, ids in self.tables:
            assert [t for b in table.pages for t in self.content[b]][: len(ids)] == ids
            assert table.length == len(ids)


@settings(max_examples=150, deadline=None)
@given(operations, st.integers(3, 14))
def test_random_schedules_keep_content_and_count(steps, pages):
    """Two tokens only, so that prefixes are alike all the time; a small pool, so that it runs out."""
    model = Model(pages)
    for step, (kind, which, count) in enumerate(steps):
        tokens = [(step * 7 + i * i) % 2 for i in range(count)]
        if kind == "begin":
            table = model.pool.match(tokens)
            model.tables.append((table, tokens[: table.length]))
            model.grow(*model.tables[-1], tokens[table.length :])
        elif model.tables:
            table, ids = model.tables[which % len(model.tables)]
            if kind == "grow":
                model.grow(table, ids, tokens)
            elif kind == "fork":
                model.tables.append((model.pool.fork(table), list(ids)))
            else:
                model.pool.release(table)
                model.tables.pop(which % len(model.tables))
        model.check()
    for table, _ in model.tables:
        model.pool.release(table)
    assert model.pool.free == model.pool.num_pages == pages - 1


def test_a_fork_costs_nothing_until_it_writes_into_a_half_full_page():
    pool = PagePool(10, SIZE)
    table = PageTable()
    pool.extend(table, 6)
    forks = [pool.fork(table) for _ in range(3)]
    assert pool.used == 2
    growth = pool.extend(forks[0], 1)
    assert growth.copies == [(table.pages[1], forks[0].pages[1])]
    assert growth.fresh == []
    assert forks[0].pages[0] == table.pages[0]
    for other in (table, *forks[1:]):
        pool.release(other)
    assert pool.extend(forks[0], 2).copies == [], "nobody else holds it any more"


def test_a_prefix_is_found_while_it_is_held_and_after_until_its_place_is_needed():
    pool = PagePool(5, SIZE)
    ids = list(range(10))
    table = pool.match(ids)
    pool.extend(table, 10)
    pool.name(table, ids)
    assert pool.match([*ids[:8], 99]).pages == table.pages[:2]
    assert pool.match([5, *ids[1:]]).pages == [], "the second page means nothing without the first"
    pool.release(table)
    pool.release(pool.match(ids))
    assert pool.free == 2, "what was matched above is held"
    other = PageTable()
    with pytest.raises(OutOfPages):
        pool.extend(other, 3 * SIZE)
    assert other.pages == []
    assert pool.free == 2


def test_the_end_of_a_forgotten_prefix_goes_before_its_start():
    pool = PagePool(5, SIZE)
    ids = list(range(16))
    table = PageTable()
    pool.extend(table, 16)
    pool.name(table, ids)
    pages = list(table.pages)
    pool.release(table)
    other = PageTable()
    pool.extend(other, 2 * SIZE)
    assert pool.match(ids).pages == pages[:2]
