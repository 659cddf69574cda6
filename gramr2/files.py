"""Files that are whole or absent, and the one kind of error that is the user's to mend.

What it holds: `InputError` (bad input, said in one line; the commands turn it into exit status 2), and
the two ways in which anything is published: a file, and a directory. Both are written under a temporary
name beside their place and renamed into it, so that a reader, or a run that was killed, never meets
half of one. Temporary names begin with a dot and hold ".tmp-" (a link about to be swapped in is
".NAME.link"); nothing ever reads them. A place has one writer (`only_writer`). What is read is a file on disk
(a pipe would be waited for), and JSON that everybody reads alike (`parse_json`).

What it leaves out: what a value should be (fields.py), and whether a file is still what it was (seals.py).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from gramr2.interrupts import stop_on_interrupt

JsonRow = dict[str, Any]  # one line of a JSONL file
SECONDS_TO_SPEAK = 3  # that the other ranks leave the first, to say what was wrong
# A full disk or quota, a limit on a file's size, no leave to write; a file for a directory, or the reverse.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
UNWRITABLE |= {errno.EISDIR, errno.ENOTDIR, errno.EEXIST}

LOST_PEER = ("Connection closed by peer", "Connection reset by peer")  # how torch's exchanges say it
NO_NAMES = {errno.ENAMETOOLONG, errno.ELOOP}  # a path that no file system takes


class InputError(ValueError):
    """Bad input: names the file, row or field, and says what to do. One line."""


def need(holds: bool, message: str) -> None:
    """What has to hold of the input; where it does not, the message says what to do."""
    if not holds:
        raise InputError(message)


def as_started(text: str) -> str:
    """A text that names commands, which are scripts in a clone, as whoever started this one types them."""
    if not Path(sys.argv[0]).name.startswith("gramr2-"):
        return text
    text = re.sub(r"(torchrun .*?)(\w+)\.py", r"\1-m gramr2.commands.\2", text)
    return re.sub(r"(python )?\b(train|selftrain|infer)\.py\b", r"gramr2-\2", text)


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line as well, and whose help keeps the lines of its docstring."""

    def __init__(self, name: str, description: str | None):
        name, description = as_started(name), as_started(description or "")
        super().__init__(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise InputError(f"{message} (--help shows what there is)")


def sync(path: Path) -> None:
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
    need(target.is_file() or not os.path.lexists(target), f"{target}: is there, and is no file; name another")
    temporary = _temporary(target)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
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
            sync(path)
        sync(temporary)
        if target.exists() or target.is_symlink():
            _replace_directory(temporary, target)
        else:
            os.rename(temporary, target)
        sync(target.parent)
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
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}: row {number} is damaged ({error})") from None


def digest(path: str | Path) -> str:
    """A hash of a file's content, as 16 hexadecimal digits; or says in one line why it cannot be read."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def short_hash(content: bytes) -> str:
    """As `digest`, of what is in memory."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_text(path: str | Path) -> str:
    """Reads a text byte for byte (a newline stays as it was written), or says in one line why it cannot."""
    with open_file(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: str | Path) -> Any:
    """Reads a JSON file, or says in one line why it cannot."""
    try:
        return parse_json(read_text(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.20} is no finite number")
    return value


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f'the field "{twice:.40}" stands there twice')
    return found


_READER = json.JSONDecoder(object_pairs_hook=_each_name_once, parse_float=_finite, parse_constant=_finite)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """JSON that every reader reads alike, or a ValueError: numbers are finite, a name stands once in its
    object, texts are Unicode. (Python's own reader takes NaN, the last of two, and half characters.)"""
    text = (text if isinstance(text, str) else text.decode("utf-8")).removeprefix("\ufeff").strip()
    try:
        value = _READER.decode(text)
        if _HALF.search(text):  # half of a character, or both halves of one
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("text that is not Unicode: half of a surrogate pair") from None
    except ValueError as error:
        if "digits" in str(error):  # Python's own limit
            raise ValueError("a number that is too long") from None
        raise
    return value


def open_file(path: str | Path) -> BufferedReader:
    """Opens a file on disk to read bytes. A pipe or a device is refused before it is opened: it may never
    give anything."""
    with read_errors_as_input_errors(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode):  # of a directory, the system says in its own words what is wrong
            need(stat.S_ISREG(mode), f"{path}: a pipe or a device; expected a file on disk")
        return Path(path).open("rb")


@contextlib.contextmanager
def only_writer(place: Path, is_directory: bool = False) -> Iterator[None]:
    """Holds a file, or a directory, against other processes. The system lets go when the holder dies."""
    with disk_errors_as_input_errors(place):
        is_new = is_directory and not place.exists()
        lock = place / ".lock" if is_directory else place.parent / f".{place.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        need(os.fstat(handle).st_size == 0, f"{lock}: is no lock of ours; take it away")
        held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file that was opened here.
            held = os.path.samestat(os.fstat(handle), os.stat(lock))
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError:  # a file system without locks: nobody is kept out
            pass
        need(held, f"{place}: another process is at work there; wait until it ends, or name another place")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # something was left in it
                    place.rmdir()
    finally:
        os.close(handle)


@contextlib.contextmanager
def read_errors_as_input_errors(path: str | Path) -> Iterator[None]:
    """A file that is not there, or cannot be read, is named."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a name that no file has
        raise InputError(f"{path!r:.60}: {error}") from None


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


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text as a terminal may show it: its control characters, but tab and newline, as JSON writes them.

    A response could otherwise move the cursor, and a verdict with it."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def exit_status(main, *args) -> int:
    """Runs a command's main and maps what happened to the exit status that every command shares.

    Under torchrun every rank meets the same bad input; the first one says it, and the others let it: the
    launcher ends all of them as soon as one has gone.
    """
    message, rank = "", int(os.environ.get("RANK", 0))
    try:
        status = main(*args) or 0
        sys.stdout.flush()
    except InputError as error:
        status, message = 2, "error: " + " ".join(visible(as_started(str(error))).split())
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except BrokenPipeError:  # whoever read what was printed has left, as `| head` does
        status = 141  # as of those that the signal ends: a run may have been cut
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in NO_NAMES:
            raise
        status, message = 2, f"error: {visible(str(error.filename)):.60}…: {error.strerror}"
    except RuntimeError as error:
        if not any(each in str(error) for each in LOST_PEER):
            raise
        status, message, rank = 1, "error: another rank has ended; run the same command again", 0
    if message and rank == 0:
        print(message, file=sys.stderr, flush=True)
    elif status == 2:
        time.sleep(SECONDS_TO_SPEAK)
    return status


def run_command(main) -> None:
    """A command's last line: runs its main on what was typed, until it ends or is told to.

    Threads that wait for each other sleep, instead of keeping a core from whatever else runs: read when torch
    is loaded, which a main does late, and set here alone, for a library leaves the environment as it is.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def until_told(argv: list[str]) -> int | None:
        with stop_on_interrupt():
            return main(argv)

    sys.exit(exit_status(until_told, sys.argv[1:]))
