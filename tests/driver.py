"""Runs trainings for tests in forked children, killed where a test asks: see `trainings.drive`.

A process of its own that imports torch once and computes nothing itself, so that every fork is as good as
a fresh start and costs no import. Jobs come on stdin, a JSON object a line, and results go back:
    stage, config {}, data [], model, out       what gramr2.fit.train takes
    ranks       processes (default 1)
    kill        ["before" | "after", n]: SIGKILL around the n-th publication (os.rename or os.replace)
    kill_after  seconds until SIGKILL; stop_at: SIGTERM as soon as that many steps are in metrics.jsonl
    die_at      [rank, step]: that rank SIGKILLs itself
    nan_at      steps whose loss is made not a number
    file_limit  bytes that a file may have (a full disk)
    sgd         one plain gradient step of rate 1 instead of AdamW
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import forks
import torch

from gramr2 import fit, resume
from gramr2.files import InputError
from gramr2.settings import TrainSettings

PATIENCE = 300  # seconds for a job


def count_publications(kill, written: Path) -> None:
    """Patches the two calls by which anything is published, and dies around the n-th of them."""
    seen = 0
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def patched(*arguments, original=original, **named):
            nonlocal seen
            seen += 1
            written.write_text(str(seen))
            if kill == ["before", seen]:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if kill == ["after", seen]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, patched)


def patch_steps(job: dict, rank: int) -> None:
    original = fit.Loop.step

    def step(self, examples):
        if job.get("die_at") == [rank, self.cursor.step]:
            os.kill(os.getpid(), signal.SIGKILL)
        bad = self.cursor.step in job.get("nan_at", ())
        objective = self.trainee.objective
        if bad:
            self.trainee.objective = lambda *arguments: objective(*arguments) * float("nan")
        try:
            return original(self, examples)
        finally:
            self.trainee.objective = objective

    fit.Loop.step = step


def child(job: dict, rank: int) -> int:
    signal.alarm(0)
    os.dup2(os.open(job["out"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    if "file_limit" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    if rank == 0:
        count_publications(job.get("kill"), Path(job["out"] + ".publications"))
    patch_steps(job, rank)
    if job.get("sgd"):
        # By `patch`, which refuses a name that is no longer there.
        patch.object(fit, "make_optimizer", lambda weights, _: torch.optim.SGD(weights)).start()
        patch.object(fit, "learning_rate_at", lambda *_: 1.0).start()
        patch.object(resume, "training_state", lambda *_: {}).start()
    try:
        figures = fit.train(
            job["stage"], TrainSettings(**job["config"]), job["data"], job["model"], Path(job["out"])
        )
        if rank == 0:
            Path(job["out"] + ".figures").write_text(json.dumps(figures))
        return 0
    except InputError as error:
        if rank == 0:
            Path(job["out"] + ".error").write_text(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def run(job: dict) -> dict:
    out = job["out"]
    for name in ("figures", "error", "log"):
        Path(f"{out}.{name}").unlink(missing_ok=True)
    started = time.monotonic()
    signal.alarm(PATIENCE)  # ends this process, and its reader sees that
    children = forks.fork_ranks(lambda rank: child(job, rank), job.get("ranks", 1))
    if "kill_after" in job:
        forks.kill(children, after=job["kill_after"])
    if "stop_at" in job:
        while lines(Path(out) / "metrics.jsonl") < job["stop_at"] and time.monotonic() < started + 60:
            time.sleep(0.002)
        forks.kill(children, signal.SIGTERM)
    result = {"statuses": forks.exits(children), "seconds": time.monotonic() - started}
    signal.alarm(0)
    for name in ("figures", "error", "log", "publications"):
        path = Path(f"{out}.{name}")
        text = path.read_text() if path.exists() else ""
        read_as_json = name in ("figures", "publications")
        result[name] = json.loads(text or "null") if read_as_json else text  # a kill may leave it empty
    return result


if __name__ == "__main__":
    # A training imports these late, and in every fork anew if they are not here.
    for module in ("torch._dynamo", "jinja2.sandbox", "jinja2.ext"):
        importlib.import_module(module)
    gc.freeze()  # a fork that collects its garbage need not look at all that was imported
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
    gc.unfreeze()  # what was frozen would be taken for leaked
