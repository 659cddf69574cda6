"""Ctrl-C and SIGTERM, from a command's first line to its last: one line, and exit status 130.

The commands import this before anything else, for what they import takes longer than a finger, and finds
what is not installed. It leaves out: trainings, which save first (fit.stop_on_signals), and what is printed
(files.exit_status, installed.say_why).
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

from gramr2.installed import say_why

AGAIN = 2.0  # seconds within which another signal is the same one: a terminal and a launcher both send it


def end_in_one_line() -> None:
    """Until a command's main runs, both end it at once: it has done nothing yet. So does, until its end, what
    cannot be imported."""
    sys.excepthook = say_why

    def end(number: int, frame: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, end)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[None]:
    """In the block, the first of them is a KeyboardInterrupt. A later one, also behind the block, while the
    process leaves, is not waited for."""
    first: list[float] = []

    def stop(number: int, frame: object) -> None:
        first.append(time.monotonic())
        if len(first) == 1:
            raise KeyboardInterrupt
        if first[-1] - first[0] > AGAIN:
            os._exit(130)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, stop)
    try:
        yield
    finally:
        first.append(time.monotonic())
