"""Runs infer.py for tests in forked children, four pairs to a generate call, killed where a test asks.

A process of its own that imports torch once and computes nothing itself, so that every fork is as good as a
fresh start and costs no import. A line on stdin is a number of ranks and a command's words as a JSON list;
what comes back is the children's pids and, when they have ended, their exit statuses.
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

        def there() -> bool:
            return out.exists() and out.read_bytes().count(b"\n") >= kill_at

        return self.run_ranks(1, words, None if kill_at is None else there)[0]

    def run_ranks(self, ranks: int, words, kill_when=None) -> list[int]:
        """The exit statuses of each rank; with `kill_when`, SIGKILL to the last as soon as that is true."""
        self.parent.stdin.write(json.dumps([ranks, *map(str, words)]) + "\n")
        self.parent.stdin.flush()
        pids, latest = self.parent.stdout.readline().split(), time.monotonic() + 60
        while kill_when is not None and not kill_when():
            assert time.monotonic() < latest, "what was waited for has not come in a minute"
            time.sleep(0.001)
        if kill_when is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have come to its end
                os.kill(int(pids[-1]), signal.SIGKILL)
        return [int(status) for status in self.parent.stdout.readline().split()]

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait()


def child(words: list[str]) -> int:
    from gramr2 import judge, run_directory
    from gramr2.commands import infer
    from gramr2.extras import remote
    from gramr2.files import exit_status

    os.dup2(2, 1)  # stdout is for pids and statuses
    judge.pairs_per_call = run_directory.pairs_per_call = lambda _: 4
    remote.FIRST_WAIT, remote.SECONDS = 0.01, 0.5
    return exit_status(infer.main, words)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    # Sampling imports the first late, and the command the others: in every fork anew if they are not here.
    for module in (
        "torch._dynamo",
        "gramr2.judge",
        "gramr2.parallel",
        "gramr2.extras.formats",
        "gramr2.commands.infer",
    ):
        importlib.import_module(module)
    for line in sys.stdin:
        ranks, *words = json.loads(line)
        pids = forks.fork_ranks(lambda rank, words=words: child(words), ranks)
        print(*pids, flush=True)
        print(*forks.exits(pids), flush=True)
