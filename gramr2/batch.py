"""The arrays of a pass of the decoder: which rows read which pages, and where they write.

A token always reads its keys in the same two parts: the full pages of its prompt, from the start, and
everything behind them, from there (`Prompt.shared_tokens`). The first part of several rows is one item
that reads the pages once for all of them, be they a chunk's tokens or the samples of a prompt. Whether a
token is computed in a chunk, alone, or again after its blocks were lost makes no difference to its cuts.

It leaves out: tensors. Everything is laid out in numpy, and engine.py or graphs.py takes it to the device.

Shapes: R rows of a decode step, T tokens of a pass, U tokens without padding, M pages of a row; I items, J
queries of an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple

import numpy as np

import kernels
from gramr2.cache import NULL
from gramr2.requests import Chunk, OpenSample
from kernels.reference import Array, Reads


class Item(NamedTuple):
    """Rows that read the same pages, and how many of the pages' keys each may see."""

    rows: np.ndarray
    visible: np.ndarray
    pages: Sequence[int]


@dataclass(frozen=True)
class Prefill:
    """A pass over prompts' chunks."""

    ids_T: np.ndarray
    positions_T: np.ndarray
    places_U: np.ndarray  # where keys and values are written: page * page size + place
    reads: list[Reads[np.ndarray]]


@dataclass(frozen=True)
class DecodeBatch(Generic[Array]):
    """A pass that decodes: arrays of the host, or tensors of the device."""

    slots_R: Array
    positions_R: Array
    seeds_R: Array  # of the noise
    places_U: Array  # where keys and values are written
    prefix: Reads[Array]  # the prompts' full pages, for all who share them
    own: Reads[Array]  # what each row has behind them

    def arrays(self) -> list[Array]:
        first = [self.slots_R, self.positions_R, self.seeds_R, self.places_U]
        return [*first, *self.prefix.arrays(), *self.own.arrays()]

    @classmethod
    def of(cls, arrays: list[Array]) -> DecodeBatch[Array]:
        """From what `arrays` gives."""
        return cls(*arrays[:4], Reads(*arrays[4:7]), Reads(*arrays[7:]))


def prefill(chunks: list[Chunk], block_size: int, item_rows: int | None) -> Prefill:
    """`item_rows`: the most rows of an item; None is any number."""
    ids: list[int] = []
    positions, places, prefix, own = [], [], [], []
    for sequence, start, stop, blocks in chunks:
        shared, pages = sequence.prompt.shared_tokens(block_size), np.array(blocks)
        rows, position = np.arange(len(ids), len(ids) + stop - start), np.arange(start, stop)
        ids += sequence.ids[start:stop]
        positions.append(position)
        places.append(pages[position // block_size] * block_size + position % block_size)
        first = 0 if start < shared else shared  # where the part begins that it is in
        if first:
            prefix += _items(rows, np.full(len(rows), first), pages[: first // block_size], item_rows)
        part = pages[first // block_size : -(-stop // block_size)]
        own += _items(rows, position - first + 1, part, item_rows)
    reads = [_reads(items) for part in (prefix, own) for items in _of_one_size(part, item_rows)]
    return Prefill(padded(np.array(ids)), padded(np.concatenate(positions)), np.concatenate(places), reads)


class DecodeRows:
    """What a decode batch keeps from step to step, until a sample joins, leaves or gets a page."""

    def __init__(self, samples: list[OpenSample], block_size: int, item_rows: int | None, share: bool):
        self.block_size = block_size
        self.slots_R = np.array([sample.slot for sample in samples])
        self.seeds_R = np.array([sample.prompt.seeds[sample.number] for sample in samples])
        self.shared_R = np.array([sample.prompt.shared_tokens(block_size) for sample in samples])
        shared_pages = (self.shared_R // block_size).tolist()
        tables = [sample.table.blocks for sample in samples]
        self.own_RM = _stack([table[n:] for table, n in zip(tables, shared_pages, strict=True)], NULL)
        sharing: dict[tuple, list[int]] = {}  # pages -> the rows that begin with them
        for row, (table, n) in enumerate(zip(tables, shared_pages, strict=True)):
            if n:
                sharing.setdefault((*table[:n], None if share else row), []).append(row)
        items = []
        for (*pages, _), rows in sharing.items():
            items += _items(np.array(rows), self.shared_R[rows], pages, item_rows)
        self.prefix = _reads(items)

    def at(self, positions_R: np.ndarray) -> DecodeBatch[np.ndarray]:
        row_R, behind_R = np.arange(len(positions_R)), positions_R - self.shared_R
        page_R, place_R = self.own_RM[row_R, behind_R // self.block_size], behind_R % self.block_size
        own = Reads(row_R[:, None], behind_R[:, None] + 1, self.own_RM)
        places_U = page_R * self.block_size + place_R
        return DecodeBatch(self.slots_R, positions_R, self.seeds_R, places_U, self.prefix, own)


def padded(array: np.ndarray, fill: int = 0) -> np.ndarray:
    return np.pad(array, (0, -len(array) % kernels.ROWS), constant_values=fill)


def _items(rows: np.ndarray, visible: np.ndarray, pages: Sequence[int], most: int | None) -> list[Item]:
    step = most or len(rows)
    return [Item(rows[i : i + step], visible[i : i + step], pages) for i in range(0, len(rows), step)]


def _of_one_size(items: list[Item], item_rows: int | None) -> list[list[Item]]:
    """What one read takes: items that were cut to size, or else those that little padding makes alike."""
    kinds: dict[int, list[Item]] = {}
    for item in items:
        kinds.setdefault(0 if item_rows else len(item.rows).bit_length(), []).append(item)
    return list(kinds.values())


def _reads(items: list[Item]) -> Reads[np.ndarray]:
    rows, visible, pages = zip(*items, strict=True) if items else ((), (), ())
    return Reads(_stack(rows, -1), _stack(visible, 0), _stack(pages, NULL))


def _stack(lists: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    array = np.full((len(lists), max(map(len, lists), default=0)), fill, np.int64)
    for row, values in zip(array, lists, strict=True):
        row[: len(values)] = values
    return array
