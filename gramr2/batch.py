"""The arrays of the decoder's two passes: prompts' chunks, and decode rows.

A token always reads its keys in the same two parts: the full pages of its prompt, from the start, and
everything behind them, from there (`Prompt.shared_tokens`). The first part is read once for all rows that
share it. Whether a token is computed in a chunk, alone, or again after its pages were lost makes no
difference to the cuts in which its keys are added up, and so to its bits. (Where items are of a limited size,
on CUDA, a decode row that shares with no other has one part instead.)

It leaves out: tensors. Everything is laid out in numpy; engine.py or graphs.py takes it to the device.
`item_rows` is the most rows of an item of reads (kernels/reads.py); None is any number.
The rows of a pass are padded to a `multiple` (kernels/linear_cpu.py).

Shapes: R rows of a decode step, T tokens of a pass, U tokens without padding, M pages of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

import numpy as np

from gramr2.cache import NULL
from gramr2.kernels.reads import Array, Item, Reads, items_of, reads_by_size, reads_of, stack
from gramr2.requests import Chunk, DeviceStep, OpenSample


def prefill_arrays(chunks: list[Chunk], size: int, item_rows: int | None, multiple: int):
    """-> ids and positions, padded; the places where keys and values are written; reads, prefixes first."""
    ids: list[int] = []
    prefix: list[Item] = []
    own: list[Item] = []
    positions, places = [], []
    for sequence, start, stop, table in chunks:
        shared, pages = sequence.prompt.shared_tokens(size), np.array(table)
        rows, position = np.arange(len(ids), len(ids) + stop - start), np.arange(start, stop)
        ids += sequence.ids[start:stop]
        positions.append(position)
        places.append(pages[position // size] * size + position % size)
        first = 0 if start < shared else shared  # where the part begins that it is in
        if first:
            prefix += items_of(rows, np.full(len(rows), first), pages[: first // size], item_rows)
        own += items_of(rows, position - first + 1, pages[first // size : -(-stop // size)], item_rows)
    if item_rows:  # the items are of one size
        reads = [reads_of(items) for items in (prefix, own) if items]
    else:
        reads = reads_by_size(prefix) + reads_by_size(own)
    ids_T, positions_T = padded(np.array(ids), multiple), padded(np.concatenate(positions), multiple)
    return ids_T, positions_T, np.concatenate(places), reads


@dataclass(frozen=True)
class DecodeBatch(Generic[Array]):
    """A decode step: arrays of the host, or tensors of the device."""

    slots_R: Array
    positions_R: Array
    seeds_R: Array  # of the noise
    places_U: Array  # where keys and values are written: page * page size + place
    prefix: Reads[Array]  # prompts' full pages, for all who share them
    own: Reads[Array]  # what each row has behind them; all, where it shares none

    def arrays(self) -> list[Array]:
        first: list[Array] = [self.slots_R, self.positions_R, self.seeds_R, self.places_U]
        return first + self.prefix.arrays() + self.own.arrays()

    @classmethod
    def of(cls, arrays: list[Array]) -> DecodeBatch[Array]:
        """The batch whose `arrays` these are."""
        slots_R, positions_R, seeds_R, places_U = arrays[:4]
        return cls(slots_R, positions_R, seeds_R, places_U, Reads(*arrays[4:7]), Reads(*arrays[7:]))


class DecodeRows:
    """What a decode batch keeps from step to step, until a sample joins or leaves."""

    def __init__(self, step: DeviceStep, size: int, item_rows: int | None, share_prefix: bool):
        self.size, self.slots_R = size, np.array([*step.samples.values()])
        self.seeds_R = np.array([sample.prompt.seeds[sample.number] for sample in step.samples])
        self.shared_R = np.array([sample.prompt.shared_tokens(size) for sample in step.samples])
        tables = [sample.table.pages for sample in step.samples]
        sharing: dict[tuple, list[int]] = {}  # pages -> the rows that begin with them
        for row, (table, n) in enumerate(zip(tables, (self.shared_R // size).tolist(), strict=True)):
            if n:
                sharing.setdefault((*table[:n], None if share_prefix else row), []).append(row)
        items: list[Item] = []
        for (*pages, _), rows in sharing.items():
            if item_rows and len(rows) == 1:  # there one read of all is faster, and bits are not promised
                self.shared_R[rows] = 0
            else:
                items += items_of(np.array(rows), self.shared_R[rows], pages, item_rows)
        self.prefix = reads_of(items)
        begins = (self.shared_R // size).tolist()  # the page where a row's own part begins
        own = [table[n:] for table, n in zip(tables, begins, strict=True)]
        self.counts_R = np.array([len(pages) for pages in own])  # of a row's own pages
        self.own_RM = stack(own, NULL)
        self.row_of = {sample: row for row, sample in enumerate(step.samples)}

    def keep(self, samples: Iterable[OpenSample]) -> None:
        """Only these are left. What they share is still shared by them, and no two begin to share."""
        kept_R = np.array([self.row_of[sample] for sample in samples])
        place_R = np.full(len(self.slots_R) + 1, -1)  # where each row goes; the last: what is nobody's
        place_R[kept_R] = np.arange(len(kept_R))
        self.row_of = {sample: row for row, sample in enumerate(samples)}
        self.slots_R, self.seeds_R, self.shared_R = (
            x[kept_R] for x in (self.slots_R, self.seeds_R, self.shared_R)
        )
        self.counts_R, self.own_RM = self.counts_R[kept_R], self.own_RM[kept_R]
        rows_IJ = place_R[self.prefix.rows_IJ]
        held_I = (rows_IJ >= 0).any(1)
        visible_IJ = np.where(rows_IJ >= 0, self.prefix.visible_IJ, 0)
        self.prefix = Reads(rows_IJ[held_I], visible_IJ[held_I], self.prefix.pages_IM[held_I])

    def grow(self, samples: list[OpenSample]) -> None:
        """Each of these has a page more."""
        for row, page in [(self.row_of[sample], sample.table.pages[-1]) for sample in samples]:
            if self.counts_R[row] == self.own_RM.shape[1]:
                self.own_RM = np.pad(self.own_RM, ((0, 0), (0, 1)), constant_values=NULL)
            self.own_RM[row, self.counts_R[row]] = page
            self.counts_R[row] += 1

    def at(self, positions_R: np.ndarray) -> DecodeBatch[np.ndarray]:
        row_R, behind_R = np.arange(len(positions_R)), positions_R - self.shared_R
        own = Reads(row_R[:, None], behind_R[:, None] + 1, self.own_RM)
        places_U = self.own_RM[row_R, behind_R // self.size] * self.size + behind_R % self.size
        return DecodeBatch(self.slots_R, positions_R, self.seeds_R, places_U, self.prefix, own)


def padded(array: np.ndarray, multiple: int, fill: int = 0) -> np.ndarray:
    return np.append(array, np.full(-len(array) % multiple, fill))
