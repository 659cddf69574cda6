"""Forked ranks for tests: a process that has imported torch forks a child for each, and waits for them.

A fork of a process that computes nothing itself is as good as a fresh start, and costs no import.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(work: Callable[[int], int], rank: int, ranks: int, port: int) -> int:
    """A child that exits with what `work(rank)` returns; with several ranks, torchrun's variables are set."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if ranks > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        status = work(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fork_ranks(work: Callable[[int], int], ranks: int) -> list[int]:
    port = free_port()
    return [fork(work, rank, ranks, port) for rank in range(ranks)]


def kill(children: list[int], how: signal.Signals = signal.SIGKILL, after: float = 0.0) -> None:
    time.sleep(after)
    for pid in children:
        os.kill(pid, how)


def exits(children: list[int]) -> list[int]:
    """Each one's exit status once it has ended; negative: the signal that ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
