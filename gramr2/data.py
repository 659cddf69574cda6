"""Records on disk, and the order in which training meets them.

`Store` reads a JSONL file at random through an index of 8-byte offsets, so that a file of any size costs no
memory; `pack` and `order` turn example lengths into the packed batches of an epoch. Examples are never cut:
the label is their tail.

What it leaves out: what a row means (records.py), and which examples are dropped as too long (plan.py).
"""

from __future__ import annotations

import bisect
import contextlib
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gramr2.files import InputError, open_file, parse_json, publish_file

_HEADER = 4  # words before the offsets: a mark, the data file's size, its time of change, bytes of whole rows
_MARK = int.from_bytes(b"gramidx1", "little")


def is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def say_torn(path: Path, size: int) -> None:
    print(f"warning: {path}: dropped a torn last line of {size} bytes", file=sys.stderr)


def is_index(path: Path) -> bool:
    """Whether an index of ours stands there."""
    try:
        with open_file(path) as file:
            return file.read(8) == _MARK.to_bytes(8, "little")
    except (InputError, OSError):
        return False


class Store(Sequence[Any]):
    """A JSONL file as a sequence; a row is a dict, or what `make` makes of it. Nothing of it is kept.

    The index lies beside the file, as NAME.idx, and is built anew when the file has changed. A torn last
    line (a writer was killed) is not a row; `torn` is its size in bytes.
    """

    def __init__(self, path: str | Path, make: Callable[[dict], Any] | None = None):
        self.path, self.make = Path(path), make
        self._file = open_file(self.path)
        stat = os.fstat(self._file.fileno())
        index = self.path.with_name(self.path.name + ".idx")
        words = self._read_index(index, stat)
        if words is None:
            words = self._build_index(stat)
            # It stays in memory where the directory cannot be written, or another's file has that name.
            if not os.path.lexists(index) or is_index(index):
                with contextlib.suppress(OSError), publish_file(index) as temporary:
                    words.tofile(temporary)
        self._offsets = words[_HEADER:]
        self._end = int(words[3])
        self.torn = stat.st_size - self._end
        if self.torn:
            say_torn(self.path, self.torn)

    @staticmethod
    def _read_index(index: Path, stat: os.stat_result) -> np.ndarray | None:
        if not is_index(index):
            return None
        try:
            words = np.memmap(index, dtype="<u8", mode="r")
        except (OSError, ValueError):
            return None
        fresh = len(words) >= _HEADER and words[1:3].tolist() == [stat.st_size, stat.st_mtime_ns]
        whole = fresh and words[3] <= stat.st_size and (len(words) == _HEADER or words[-1] < words[3])
        return words if whole else None

    def _build_index(self, stat: os.stat_result) -> np.ndarray:
        words, position = array("Q", [_MARK, stat.st_size, stat.st_mtime_ns, 0]), 0
        for line in self._file:
            if not line.endswith(b"\n") and not is_json(line):
                break
            if not line.isspace():
                words.append(position)
            position += len(line)
        words[3] = position
        return np.array(words, dtype="<u8")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[place] for place in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.path}: row {i} of {len(self)}")
        i %= len(self)
        start = int(self._offsets[i])
        end = int(self._offsets[i + 1]) if i + 1 < len(self) else self._end
        # pread keeps no position, so threads and forked loaders may share the file.
        line = os.pread(self._file.fileno(), end - start, start)
        try:
            row = parse_json(line)
            return row if self.make is None else self.make(row)
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: row {i + 1} is not UTF-8 text") from None
        except InputError as error:
            raise InputError(f"{self.path}: row {i + 1}: {error}") from None
        except ValueError as error:
            raise InputError(f"{self.path}: row {i + 1} is not JSON ({error})") from None

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Puts examples into packs of at most `budget` tokens each, whole; → the indices in each pack.

    Longest first, each into the fullest pack that has room (best-fit decreasing). A function of the lengths
    alone.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > budget:
            raise InputError(f"example {i} has {lengths[i]} tokens, over the budget of {budget}")
        at = bisect.bisect_left(room, (lengths[i], 0))
        left, chosen = room.pop(at) if at < len(room) else (budget, len(packs))
        if chosen == len(packs):
            packs.append([])
        packs[chosen].append(i)
        bisect.insort(room, (left - lengths[i], chosen))
    return packs


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n), a function of (n, seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n)
