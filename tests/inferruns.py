"""Runs infer.py for tests in forked children, four pairs to a generate call, killed where a test asks.

A process of its own that imports torch once and computes nothing itself, so that every fork is as good as a
fresh start and costs no import. A line on stdin is a command's words as a JSON list; what comes back is the
child's pid and, when it has ended, its exit status.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks

ROOT = Path(__file__).parents[1]


class Forks:
    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.parent = subprocess.Popen([sys.executable, __file__], text=True, **pipes)

    def run(self, words, out: Path, kill_at: int | None = None) -> int:
        """The exit status; with `kill_at`, SIGKILL as soon as so many rows are in `out`."""
        self.parent.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self.parent.stdin.flush()
        pid, latest = int(self.parent.stdout.readline()), time.monotonic() + 60
        while kill_at is not None and not (out.exists() and out.read_bytes().count(b"\n") >= kill_at):
            assert time.monotonic() < latest, "no such number of rows in a minute"
            time.sleep(0.001)
        if kill_at is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have come to its end
                os.kill(pid, signal.SIGKILL)
        return int(self.parent.stdout.readline())

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait()


def child(words: list[str]) -> int:
    from gramr2 import judge
    from gramr2.commands import infer
    from gramr2.extras import remote
    from gramr2.files import exit_status

    os.dup2(2, 1)  # stdout is for pids and statuses
    judge.pairs_per_call = lambda _: 4
    remote.FIRST_WAIT, remote.SECONDS = 0.01, 0.5
    return exit_status(infer.main, words)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    # Sampling imports the first late, and the command the others: in every fork anew if they are not here.
    for module in ("torch._dynamo", "gramr2.judge", "gramr2.extras.formats", "gramr2.commands.infer"):
        importlib.import_module(module)
    for line in sys.stdin:
        words = json.loads(line)
        pid = forks.fork(lambda rank, words=words: child(words), 0, 1, 0)
        print(pid, flush=True)
        print(*forks.exits([pid]), flush=True)
