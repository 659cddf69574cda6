"""Runs selftrain.py for tests in forked children, killed where a test asks: see `Forks.run`.

As a script it is a process that has imported everything and computes nothing itself, so that every fork is
as good as a fresh start and costs no import: JSON jobs come on stdin, a line each, and results go back.
"""

import errno
import gc
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks

ROOT = Path(__file__).parents[1]
SMALL = """
[models]
backbone = "{micro}/steps/09-initial/model"
prover = "{micro}/steps/05-prover/model"

[data]
human = ["{place}/human.jsonl"]
labelled = ["{place}/labelled.jsonl"]
unlabelled = ["{place}/unlabelled.jsonl"]
test = ["{place}/test.jsonl"]

[selftrain]
iters = 1
k = 2
votes = 2
test_votes = 2
proof_tokens = 96
judge_tokens = 96
confidence = 0.0
without = ["agreement", "coherence", "quotes", "states_label", "states_other", "structure", "repetition"]
side_by_side = false  # a second process imports torch anew; see test_beside.py

[train]
batch_size = 8
steps = 2
max_length = 160
token_budget = 4096
lr = 1e-4

[train.finetune]
save_steps = 1
"""
ROWS = {"human": 6, "labelled": 8, "unlabelled": 8, "test": 4}


def finished_micro(place: Path) -> Path:
    """The finished run of the micro recipe, made where it is not there yet."""
    if not (place / "runs/micro/results.json").is_file():
        command = [sys.executable, str(ROOT / "selftrain.py"), "--recipe", str(ROOT / "recipes/micro.toml")]
        subprocess.run(command, cwd=place, check=True, capture_output=True)
    return place / "runs/micro"


def small_world(micro: Path, place: Path) -> Path:
    """A recipe whose run takes seconds: a few of micro's pairs, and its trained models to begin from."""
    for name, count in ROWS.items():
        lines = (micro / f"steps/01-world/{name}.jsonl").read_text().splitlines(keepends=True)
        (place / f"{name}.jsonl").write_text("".join(lines[:count]))
    (place / "small.toml").write_text(SMALL.format(micro=micro, place=place))
    return place / "small.toml"


class Forks:
    """The other end of the script: `run` gives it a job and waits for the result."""

    def __init__(self):
        command = [sys.executable, __file__]
        self.parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, cwd, words, **how) -> dict:
        """A job. `ranks` of it; `kill`: a file of publications that died already, to die around the first
        that is not in it; `full`: the number of publications after which the disk is full; `kill_after`:
        seconds; `die`: [rank, n], at the n-th shard it takes; `shard`: pairs of a shard."""
        job = {"cwd": str(cwd), "words": [str(word) for word in words], **how}
        self.parent.stdin.write(json.dumps(job) + "\n")
        self.parent.stdin.flush()
        return json.loads(self.parent.stdout.readline())

    def close(self):
        self.parent.stdin.close()
        self.parent.wait()


def same_results(one: Path, other: Path) -> bool:
    """results.json of two runs, seconds aside."""
    first, second = (json.loads((root / "results.json").read_text()) for root in (one, other))
    return {**first, "seconds": None} == {**second, "seconds": None}


# ---------------------------------------------------------------------------------- the script


def watch_publications(job: dict) -> None:
    """Patches the two calls by which anything is published: death around them, or a full disk, or a note."""
    log, seen = Path(job["cwd"]) / "publications", []
    killed = set(Path(job["kill"]).read_text().splitlines()) if "kill" in job else set()

    def die(moment: str) -> None:
        if "kill" in job and moment not in killed:
            with Path(job["kill"]).open("a") as file:
                file.write(f"{moment}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("rename", "replace"):
        original = getattr(os, name)

        def patched(source, target, *, original=original, **named):
            seen.append(re.sub(r"\.tmp-[^/]*", ".tmp", os.path.relpath(target, job["cwd"])))
            log.write_text("\n".join(seen))
            if len(seen) > job.get("full", math.inf):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            die(f"before {seen[-1]}")
            original(source, target, **named)
            die(f"after {seen[-1]}")

        setattr(os, name, patched)


def watch_shards(die) -> None:
    from gramr2 import run_directory

    original, taken = run_directory.claim, 0

    def claim(shard):
        nonlocal taken
        mine = original(shard)
        taken += mine
        if mine and taken == die:
            os.kill(os.getpid(), signal.SIGKILL)
        return mine

    run_directory.claim = claim


def child(job: dict, rank: int) -> int:
    from gramr2 import run_directory
    from gramr2.commands import selftrain
    from gramr2.files import exit_status

    os.chdir(job["cwd"])
    for descriptor in (1, 2):
        os.dup2(os.open(f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    if "shard" in job:
        run_directory.shard_rows = lambda *_: job["shard"]
    if rank == 0:
        watch_publications(job)
    if job.get("die", [None])[0] == rank:
        watch_shards(job["die"][1])
    return exit_status(selftrain.main, job["words"])


def run(job: dict) -> dict:
    cwd, ranks = Path(job["cwd"]), job.get("ranks", 1)
    for rank in range(ranks):
        (cwd / f"log.{rank}").unlink(missing_ok=True)
    started = time.monotonic()
    children = forks.fork_ranks(lambda rank: child(job, rank), ranks)
    if "kill_after" in job:
        forks.kill(children, after=job["kill_after"])
    statuses = forks.exits(children)
    logs = [(cwd / f"log.{rank}").read_text() for rank in range(ranks)]
    return {"statuses": statuses, "seconds": time.monotonic() - started, "logs": logs}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    # A training step imports the first late, and a run the others: in every fork anew if they are not here.
    late = ["torch._dynamo", "jinja2", "gramr2.steps", "gramr2.extras.toy_start"]
    for module in [*late, "gramr2.commands.selftrain"]:
        importlib.import_module(module)
    gc.freeze()  # a fork that collects its garbage need not look at all that was imported
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
    gc.unfreeze()  # what was frozen would be taken for leaked
