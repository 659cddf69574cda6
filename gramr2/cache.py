"""Blocks of the key/value cache: who holds which, what is shared, what may be written. No torch.

The cache is a pool of equal blocks of a few tokens each. A sequence holds a `BlockTable`: its blocks in order
and how many tokens of them are filled. Blocks are counted, not owned: the samples of one prompt begin as
forks of the prompt's table, which copies nothing. A table that grows into a block that somebody else holds
too takes a fresh one first and asks for the content to be copied (copy on write), so a shared block is never
written. Full blocks may be given a name, a number that stands for their tokens and all that stands before
them; another prompt that begins alike finds them by it. A named block that nobody holds keeps its content
until its place is needed, longest unused first.

It is bookkeeping only: the engine owns the tensors, as pages, and does the copies; the scheduler decides who
has to give way when blocks run out. It leaves out: swapping to another memory, and sharing between calls
(weights may change).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

NULL = 0  # A block that is never handed out: what unused entries of a padded table point at.


class OutOfBlocks(Exception):
    """The pool cannot serve a request; nothing has changed."""


@dataclass
class BlockTable:
    """The blocks of one sequence, and the number of tokens that stand in them."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    names: list[int] = field(default_factory=list)  # of the leading blocks, as far as they were named


@dataclass
class Growth:
    """What the owner of the tensors has to do before it writes: clear fresh blocks, copy shared ones."""

    fresh: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to)


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"a pool needs at least 2 blocks of 1 token, not {num_blocks} of {block_size}")
        self.block_size = block_size
        self.num_blocks = num_blocks - 1  # usable ones
        self.ref_counts = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, NULL, -1))  # taken from the end: low blocks stay warm
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, held by nobody, longest unused first
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # content -> (block, name)
        self._content: dict[int, tuple[int, tuple[int, ...]]] = {}  # block -> content, the way back
        self._last_name = 0

    @property
    def free(self) -> int:
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        return self.num_blocks - self.free

    def needs(self, table: BlockTable, count: int) -> int:
        """How many blocks `extend` would take for `count` more tokens."""
        blocks = -(-(table.length + count) // self.block_size)
        return blocks - len(table.blocks) + self._must_copy(table, count)

    def extend(self, table: BlockTable, count: int) -> Growth:
        """Makes room for `count` more tokens at the table's end, in blocks that nobody else holds."""
        needed = self.needs(table, count)
        if needed > self.free:
            raise OutOfBlocks(f"{needed} blocks needed, {self.free} free")
        growth = Growth()
        if self._must_copy(table, count):
            shared, table.blocks[-1] = table.blocks[-1], self._take()
            growth.copies.append((shared, table.blocks[-1]))
            self._drop(shared)
            needed -= 1
        growth.fresh = [self._take() for _ in range(needed)]
        table.blocks += growth.fresh
        table.length += count
        return growth

    def fork(self, table: BlockTable) -> BlockTable:
        """A second holder of the same content, free of charge."""
        for block in table.blocks:
            self._hold(block)
        return BlockTable(list(table.blocks), table.length, list(table.names))

    def release(self, table: BlockTable) -> None:
        """Gives a table's blocks back; it is empty afterwards."""
        for block in reversed(table.blocks):  # so that the end of a prefix is forgotten before its start
            self._drop(block)
        table.blocks, table.length, table.names = [], 0, []

    def match(self, ids: Sequence[int]) -> BlockTable:
        """A table of the longest named run of full blocks that `ids` begins with."""
        table, name = BlockTable(), 0
        for start in range(0, len(ids) - self.block_size + 1, self.block_size):
            found = self._known.get((name, tuple(ids[start : start + self.block_size])))
            if found is None:
                break
            block, name = found
            self._hold(block)
            table.blocks.append(block)
            table.names.append(name)
        table.length = len(table.blocks) * self.block_size
        return table

    def name(self, table: BlockTable, ids: Sequence[int]) -> None:
        """Makes the table's full blocks, which hold the first of `ids`, findable by `match`."""
        for index in range(len(table.names), min(table.length, len(ids)) // self.block_size):
            before = table.names[-1] if table.names else 0
            start = index * self.block_size
            content = (before, tuple(ids[start : start + self.block_size]))
            if content not in self._known:  # otherwise somebody computed the same at the same time
                self._last_name += 1
                self._known[content] = (table.blocks[index], self._last_name)
                self._content[table.blocks[index]] = content
            table.names.append(self._known[content][1])

    def _must_copy(self, table: BlockTable, count: int) -> int:
        partial = table.length % self.block_size != 0
        return int(count > 0 and partial and self.ref_counts[table.blocks[-1]] > 1)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._content.pop(block)]
        self.ref_counts[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if self.ref_counts[block] == 0:
            del self._idle[block]
        self.ref_counts[block] += 1

    def _drop(self, block: int) -> None:
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            if block in self._content:
                self._idle[block] = None
            else:
                self._empty.append(block)
