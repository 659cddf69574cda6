"""Ctrl-C and SIGTERM before a command has begun: what it imports takes longer than a finger.

The commands import this before anything else. It leaves out: what an interruption means to a command at work
(files.exit_status).
"""

import os
import signal


def quit_on_interrupt() -> None:
    """Until a command's main runs, both end it at once, in one line: it has done nothing yet."""

    def end(number: int, frame: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, end)
