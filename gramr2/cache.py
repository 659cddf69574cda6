"""Pages of the key/value cache: who holds which, what is shared, what may be written. No torch.

The cache is a pool of equal pages of a few tokens each. A sequence holds a `PageTable`: its pages in order
and how many tokens of them are filled. Pages are counted, not owned: the samples of one prompt begin as
forks of the prompt's table, which copies nothing. A table that grows into a page that somebody else holds
too takes a fresh one first and asks for the content to be copied (copy on write), so a shared page is never
written. Full pages may be given a name, a number that stands for their tokens and all that stands before
them; another prompt that begins alike finds them by it. A named page that nobody holds keeps its content
until its place is needed, longest unused first.

It is bookkeeping only: the engine owns the tensors and does the copies, and the scheduler decides who has to
give way when pages run out. It leaves out: swapping to another memory, and sharing between calls (weights
may change).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

NULL = 0  # A page that is never handed out: what unused entries of a padded table point at.


class OutOfPages(Exception):
    """The pool cannot serve a request; nothing has changed."""


@dataclass
class PageTable:
    """The pages of one sequence, and the number of tokens that stand in them."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    names: list[int] = field(default_factory=list)  # of the leading pages, as far as they were named


@dataclass
class Growth:
    """What the owner of the tensors has to do before it writes: clear fresh pages, copy shared ones."""

    fresh: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to)


class PagePool:
    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"a pool needs at least 2 pages of 1 token, not {num_pages} of {page_size}")
        self.page_size = page_size
        self.num_pages = num_pages - 1  # usable ones
        self.ref_counts = [0] * num_pages
        self._empty = list(range(num_pages - 1, NULL, -1))  # taken from the end: low pages stay warm
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, held by nobody, longest unused first
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # content -> (page, name)
        self._content: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> content, the way back
        self._last_name = 0

    @property
    def free(self) -> int:
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        return self.num_pages - self.free

    def needs(self, table: PageTable, count: int) -> int:
        """How many pages `extend` would take for `count` more tokens."""
        pages = -(-(table.length + count) // self.page_size)
        return pages - len(table.pages) + self._must_copy(table, count)

    def extend(self, table: PageTable, count: int) -> Growth:
        """Makes room for `count` more tokens at the table's end, in pages that nobody else holds."""
        needed = self.needs(table, count)
        if needed > self.free:
            raise OutOfPages(f"{needed} pages needed, {self.free} free")
        growth = Growth()
        if self._must_copy(table, count):
            shared, table.pages[-1] = table.pages[-1], self._take()
            growth.copies.append((shared, table.pages[-1]))
            self._drop(shared)
            needed -= 1
        growth.fresh = [self._take() for _ in range(needed)]
        table.pages += growth.fresh
        table.length += count
        return growth

    def fork(self, table: PageTable) -> PageTable:
        """A second holder of the same content, free of charge."""
        for page in table.pages:
            self._hold(page)
        return PageTable(list(table.pages), table.length, list(table.names))

    def release(self, table: PageTable) -> None:
        """Gives a table's pages back; it is empty afterwards."""
        for page in reversed(table.pages):  # so that the end of a prefix is forgotten before its start
            self._drop(page)
        table.pages, table.length, table.names = [], 0, []

    def match(self, ids: Sequence[int]) -> PageTable:
        """A table of the longest named run of full pages that `ids` begins with."""
        table, name = PageTable(), 0
        for start in range(0, len(ids) - self.page_size + 1, self.page_size):
            found = self._known.get((name, tuple(ids[start : start + self.page_size])))
            if found is None:
                break
            page, name = found
            self._hold(page)
            table.pages.append(page)
            table.names.append(name)
        table.length = len(table.pages) * self.page_size
        return table

    def name(self, table: PageTable, ids: Sequence[int]) -> None:
        """Makes the table's full pages, which hold the first of `ids`, findable by `match`."""
        for index in range(len(table.names), min(table.length, len(ids)) // self.page_size):
            before = table.names[-1] if table.names else 0
            start = index * self.page_size
            content = (before, tuple(ids[start : start + self.page_size]))
            if content not in self._known:  # otherwise somebody computed the same at the same time
                self._last_name += 1
                self._known[content] = (table.pages[index], self._last_name)
                self._content[table.pages[index]] = content
            table.names.append(self._known[content][1])

    def _must_copy(self, table: PageTable, count: int) -> int:
        partial = table.length % self.page_size != 0
        return int(count > 0 and partial and self.ref_counts[table.pages[-1]] > 1)

    def _take(self) -> int:
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._content.pop(page)]
        self.ref_counts[page] = 1
        return page

    def _hold(self, page: int) -> None:
        if self.ref_counts[page] == 0:
            del self._idle[page]
        self.ref_counts[page] += 1

    def _drop(self, page: int) -> None:
        self.ref_counts[page] -= 1
        if self.ref_counts[page] == 0:
            if page in self._content:
                self._idle[page] = None
            else:
                self._empty.append(page)
