"""Files that are whole or absent, and the one kind of error that is the user's to mend.

What it holds: `InputError` (bad input, said in one line; the commands turn it into exit status 2), and
the two ways in which anything is published: a file, and a directory. Both are written under a temporary
name beside their place and renamed into it, so that a reader, or a run that was killed, never meets
half of one. Temporary names begin with a dot and hold ".tmp-" (a link about to be swapped in is
".NAME.link"); nothing ever reads them.

What it leaves out: locking. A path has one writer.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

JsonRow = dict[str, Any]  # one line of a JSONL file
# A full disk or quota, a limit on a file's size, no leave to write; a file for a directory, or the reverse.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
UNWRITABLE |= {errno.EISDIR, errno.ENOTDIR, errno.EEXIST}


class InputError(ValueError):
    """Bad input: names the file, row or field, and says what to do. One line."""


def need(holds: bool, message: str) -> None:
    """What has to hold of the input; where it does not, the message says what to do."""
    if not holds:
        raise InputError(message)


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line as well, and whose help keeps the lines of its docstring."""

    def __init__(self, name: str, description: str | None):
        super().__init__(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise InputError(f"{message} (--help shows what there is)")


def _sync(path: Path) -> None:
    """Forces a file's, or a directory's, content to disk: a rename must not overtake its data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(target: Path) -> Path:
    """In the target's directory, and unlike any other: several hosts may write into a shared one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def publish_file(target: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write; on a clean exit it replaces `target`, otherwise it is gone."""
    target = Path(target)
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def publish_directory(target: str | Path) -> Iterator[Path]:
    """Yields a temporary directory to fill; on a clean exit it takes the place of `target`.

    The first publication is a rename. A later one is renamed to the versioned name `TARGET.vN`, and
    `target` becomes, or already is, a symbolic link that is swapped to it in one step; the version it
    replaces is removed afterwards.
    """
    target = Path(target)
    for stale in target.parent.glob(f".{target.name}.tmp-*"):  # left by a writer that was killed
        shutil.rmtree(stale, ignore_errors=True)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        if target.exists() or target.is_symlink():
            _replace_directory(temporary, target)
        else:
            os.rename(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(fresh: Path, target: Path) -> None:
    """A new version beside the old ones, and a link to it; then the old ones go, a killed write's too."""
    old = [path for path in target.parent.glob(f"{target.name}.v*") if path.suffix[2:].isdigit()]
    newest = max((int(path.suffix[2:]) for path in old), default=0)
    previous, versioned = (target.with_name(f"{target.name}.v{newest + more}") for more in (1, 2))
    os.rename(fresh, versioned)
    link = _temporary(target).with_suffix(".link")
    link.unlink(missing_ok=True)
    link.symlink_to(versioned.name)
    if not target.is_symlink():
        # A plain directory cannot be replaced by a link in one step on every file system. It happens
        # once in a path's life, and between these two renames both versions are whole on disk.
        os.rename(target, previous)
    os.replace(link, target)
    for path in (*old, previous):
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Publishes `value` as readable JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with publish_file(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


@contextlib.contextmanager
def publish_rows(path: str | Path) -> Iterator[Callable[[JsonRow], None]]:
    """Yields a function that writes a row; on a clean exit the rows are the JSONL file `path`."""
    with publish_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)


def write_rows(path: str | Path, rows: Iterable[JsonRow]) -> Path:
    """Publishes a JSONL file."""
    with publish_rows(path) as write:
        for row in rows:
            write(row)
    return Path(path)


def read_rows(path: str | Path) -> Iterator[JsonRow]:
    """The rows of a JSONL file that this project published."""
    with Path(path).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def digest(path: str | Path) -> str:
    """A hash of a file's content, as 16 hexadecimal digits; or says in one line why it cannot be read."""
    with read_errors_as_input_errors(path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_text(path: str | Path) -> str:
    """Reads a text byte for byte (a newline stays as it was written), or says in one line why it cannot."""
    with read_errors_as_input_errors(path):
        content = Path(path).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: str | Path) -> Any:
    """Reads a JSON file, or says in one line why it cannot."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deep nesting, too
        raise InputError(f"{path}: not JSON ({error})") from None


@contextlib.contextmanager
def read_errors_as_input_errors(path: str | Path) -> Iterator[None]:
    """A file that is not there, or cannot be read, is named."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def disk_errors_as_input_errors(place: str | Path) -> Iterator[None]:
    """A disk that is full, or closed to writing, is the user's to mend; `place` is what was written."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        named = error.filename or place
        raise InputError(f"{named}: {error.strerror}; mend that, and run the same command again") from None


def exit_status(main, *args) -> int:
    """Runs a command's main and maps what happened to the exit status that every command shares.

    Under torchrun every rank meets the same bad input; the first one says it.
    """
    message = ""
    try:
        status = main(*args) or 0
        sys.stdout.flush()
    except InputError as error:
        status, message = 2, "error: " + " ".join(str(error).split())
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except BrokenPipeError:  # whoever read what was printed has left, as `| head` does
        status = 141  # as of those that the signal ends: a run may have been cut
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message and int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr)
    return status
