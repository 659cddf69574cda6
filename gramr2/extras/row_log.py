"""A JSONL file that grows by a row at a time, and survives a kill: at most the row that it cut is lost.

It leaves out: files that appear whole (files.py), and reading (data.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from gramr2.data import is_json, say_torn
from gramr2.files import InputError, JsonRow, disk_errors_as_input_errors, need, open_file, parse_json


def is_cut(line: bytes, begins: bytes) -> bool:
    """Whether a last line is the beginning of a row that begins so: all that is wrong is that it ends."""
    text = line.decode("utf-8", "ignore")
    try:
        parse_json(text)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text) - len("false") or error.msg.startswith(("Unterminated", "Invalid \\"))
        return at_end and (line.startswith(begins) or begins.startswith(line))
    except ValueError:
        pass
    return False


def read_log(path: Path, begins: bytes) -> Iterator[JsonRow]:
    """The rows of a log as it stands. What no RowLog has written is refused, and left as it is."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = parse_json(line)
            except ValueError as error:
                if not line.endswith(b"\n") and is_cut(line, begins):
                    return
                raise InputError(f"{path}: row {number} is not of a log of ours ({error})") from None
            yield row


class RowLog:
    """Appends rows to a JSONL file. A row that a kill cut is dropped, with a warning, on the next opening;
    `begins` is what every row begins with.
    """

    def __init__(self, path: str | Path, begins: bytes):
        self.path, self.begins = Path(path), begins
        if self.path.exists():
            open_file(self.path).close()  # to append to a pipe would wait for its reader
        with disk_errors_as_input_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        self._mend()

    def _mend(self) -> None:
        """Brings the file to the end of its last whole row."""
        size = end = self._file.seek(0, os.SEEK_END)
        tail = b""
        while end and b"\n" not in tail:
            end = max(0, end - (1 << 16))
            self._file.seek(end)
            tail = self._file.read(size - end)
        rest = tail[tail.rfind(b"\n") + 1 :]
        if rest and is_json(rest):
            self._file.write(b"\n")
        elif rest:
            need(is_cut(rest, self.begins), f"{self.path}: its last line is no row that was cut")
            say_torn(self.path, len(rest))
            self._file.truncate(size - len(rest))

    def write(self, row: JsonRow) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()  # to the system: survives the process, and after `sync` the machine

    def sync(self) -> None:
        """Forces what was written to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    def __enter__(self) -> RowLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()
