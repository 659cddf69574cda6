"""Seals: what a file held when it was finished, so that it is known again before it is used.

A seal is {"hash", "bytes", "changed"}. A file of the same size and time of change is taken for the same;
where either differs, as after a copy, or where it is asked for, the whole file is read and its hash decides.
So to take up a finished run costs a look at its files, and one byte that changed is still seen.

A record that says such things is signed with a hash of its own (`write_signed`, `read_signed`).

It leaves out: who may write (files.only_writer). A hash keeps out accidents, and nobody who means harm.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gramr2.fields import Fields
from gramr2.files import (
    InputError,
    JsonRow,
    digest,
    read_errors_as_input_errors,
    read_json,
    short_hash,
    write_json,
)

SEALS = "seals.json"  # in a model directory that was published here
CARD = "README.md"  # there it is never sealed: results are added to it, and whoever passes it on edits it


def seal(path: Path, known: Any = None, whole: bool = False) -> JsonRow:
    """The seal of a file; its hash is taken from `known`, where that is a seal of its size and time."""
    with read_errors_as_input_errors(path):
        stat = path.stat()
    stamp = {"bytes": stat.st_size, "changed": stat.st_mtime_ns}
    if not whole and isinstance(known, dict) and stamp.items() <= known.items():
        return {"hash": Fields(known, f"{path}: its seal: ").get("hash", str), **stamp}
    return {"hash": digest(path), **stamp}


def names_below(place: Path, but: Iterable[str] = ()) -> list[str]:
    """The files below a directory, by their names from there; hidden ones, indices and `but` are left out."""
    paths = (path.relative_to(place) for path in sorted(place.rglob("*")) if path.is_file())
    shown = (
        path for path in paths if path.suffix != ".idx" and not any(part[0] == "." for part in path.parts)
    )
    return [str(path) for path in shown if {*but}.isdisjoint(path.parts)]


def seals_below(place: Path, but: Iterable[str] = ()) -> dict[str, JsonRow]:
    return {name: seal(place / name) for name in names_below(place, but)}


def check_seals(place: Path, seals: JsonRow, what_to_do: str, whole: bool = False) -> None:
    """Refuses the first file below `place` that is not what its seal says, or that is gone."""
    for name, known in seals.items():
        path = place / name
        if not path.is_file():
            raise InputError(f"{path}: it is gone; {what_to_do}")
        if seal(path, known, whole)["hash"] != Fields(known, f"{path}: its seal: ").get("hash", str):
            raise InputError(f"{path}: it is no longer what was finished; {what_to_do}")


def write_signed(path: Path, record: JsonRow) -> None:
    """Publishes a record with a hash of what it says."""
    record = json.loads(json.dumps(record))  # as it will be read: a tuple comes as a list
    write_json(path, record | {"signature": _signature(record)})


def read_signed(path: Path) -> JsonRow:
    """A record as it was written; one that was changed is refused."""
    record = dict(Fields(read_json(path), f"{path}: ").row)
    if record.pop("signature", None) != _signature(record):
        raise InputError(f"{path}: it is no longer what was written")
    return record


def _signature(record: JsonRow) -> str:
    return short_hash(json.dumps(record, sort_keys=True).encode())
