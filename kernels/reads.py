"""What paged attention reads: which rows of a pass look at which pages, laid out in arrays.

Rows that read the same pages make an item, so that these are read once for all of them: a sample's own
pages, a chunk's tokens, or the samples that share a prompt. `Reads` is a batch of items, padded to one
shape; it is built on the host, and then taken to the device.

Left out: what is in the pages. Legend of suffixes: I items, J queries of an item, M pages of an item.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)  # of the host, or of a device
Numbers = Sequence[int] | np.ndarray


class Item(NamedTuple):
    """Rows that read the same pages, and how many of their keys, from the first on, each may see."""

    rows: np.ndarray
    visible: np.ndarray
    pages: Numbers


@dataclass(eq=False)
class Reads(Generic[Array]):
    rows_IJ: Array  # each item's queries, as rows of the flat batch; -1 where it has fewer than J
    visible_IJ: Array  # how many keys, from the first page's start on, each of them may see
    pages_IM: Array  # each item's pages, in order; behind the last that is visible, any page
    layout: Any = field(default=None, init=False, repr=False)  # what a kernel keeps for the next layer
    moved: bool = field(default=False, init=False, repr=False)  # since it was laid out

    def arrays(self) -> list[Array]:
        return [self.rows_IJ, self.visible_IJ, self.pages_IM]

    def move(self, visible_IJ: Array) -> None:
        """A step on: the same rows, which see other keys of the same pages."""
        self.visible_IJ, self.moved = visible_IJ, True


def items_of(rows: np.ndarray, visible: np.ndarray, pages: Numbers, most: int | None) -> list[Item]:
    """One item, or several with at most so many rows each."""
    step = most or len(rows)
    return [Item(rows[i : i + step], visible[i : i + step], pages) for i in range(0, len(rows), step)]


def reads_of(items: list[Item]) -> Reads[np.ndarray]:
    rows, visible, pages = zip(*items, strict=True) if items else ((), (), ())
    return Reads(stack(rows, -1), stack(visible, 0), stack(pages, 0))


def reads_by_size(items: list[Item]) -> list[Reads[np.ndarray]]:
    """Several, each of items that little padding makes alike."""
    kinds: dict[int, list[Item]] = {}
    for item in items:
        kinds.setdefault(len(item.rows).bit_length(), []).append(item)
    return [reads_of(kind) for kind in kinds.values()]


def stack(lists: Sequence[Numbers], fill: int) -> np.ndarray:
    """One row for each list, filled up to the longest."""
    array = np.full((len(lists), max(map(len, lists), default=0)), fill, np.int64)
    for row, values in zip(array, lists, strict=True):
        row[: len(values)] = values
    return array
