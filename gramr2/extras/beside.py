"""A second process for what the loop does not wait for: tests, and the models that the paper compares with.

Two threads wait for each other at every operation of a small model; two processes of one thread each do not
(benchmarks/README.md, "Threads on a CPU"). So selftrain.py first goes through the loop with `Beside` in the
place of `Results`: whatever only measures is written down, and done here, meanwhile, in a second process.
Then it goes through everything as one process would, and finds it done. What the second process did not do,
whatever became of it, the first does in this second pass: results, and errors, are those of one process.

The two share no step. Each job is claimed before it is begun, as shards are, and the numbers of steps are
given by the first process alone. The second speaks into beside/log, saves a training that is stopped, and
ends as soon as the first is gone.

It leaves out: several ranks and GPUs, where one process does all; a third process, for which the rounds leave
nothing to do.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import multiprocessing
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gramr2.extras.inputs import RunInputs
from gramr2.extras.results import LONGER, Results, test_step
from gramr2.files import exit_status, only_writer
from gramr2.interrupts import stop_on_interrupt
from gramr2.run_directory import StoppedAsAsked, claim, only_its_name, remove_leftovers, step_paths

if TYPE_CHECKING:
    from gramr2.steps import Run

SECONDS_TO_SAVE = 20  # of a training that is stopped


class Job(NamedTuple):
    """A call of a method of `Results`, known by the step that it ends with."""

    step: str
    method: str
    arguments: tuple[Any, ...]

    def do(self, results: Results, place: Path) -> None:
        """In one of the two processes: in the one that comes first."""
        if claim(place / self.step):
            getattr(results, self.method)(*self.arguments)


def go_ahead(run: Run, inputs: RunInputs, loop: Callable[..., None], baselines: Callable[..., None]) -> None:
    """Where a core is left: the loop alone, and meanwhile, in a second process, what comes up beside it.

    The baselines need the pairs that `filter-labelled` keeps, and nothing behind it.
    """
    from gramr2.steps import NothingKept

    if not is_worth_it(run):
        return
    # A loop that cannot go on ends the second process, and says why in the pass behind this one.
    with contextlib.suppress(NothingKept), Beside(run, inputs) as beside:
        if run.settings.baselines:
            first = copy.copy(run.directory)
            first.until = "filter-labelled"
            with contextlib.suppress(StoppedAsAsked):
                loop(dataclasses.replace(run, directory=first), inputs, beside)
            baselines(run, inputs, beside)
        loop(run, inputs, beside)
        beside.finish()


def is_worth_it(run: Run) -> bool:
    """One process on a CPU with as many cores again, that is to go to the end."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    alone = run.ranks.size == 1 and run.ranks.device.type == "cpu" and run.directory.until is None
    return run.settings.side_by_side and alone and 2 * run.trainings["reward"].threads <= cores


def check_it_has_ended(root: Path) -> None:
    """Refuses a run whose second process, left behind by a kill, has not noticed yet."""
    with only_writer(root / "steps", is_directory=True):
        pass


class Beside:
    """Stands in the place of `Results`: what is asked of it, a second process does."""

    def __init__(self, run: Run, inputs: RunInputs):
        self.directory, self.place = run.directory, run.directory.root / "beside"
        shutil.rmtree(self.place, ignore_errors=True)
        ahead = copy.copy(run.directory)
        ahead.ahead = True
        self.results = Results(dataclasses.replace(run, directory=ahead), inputs)
        self.jobs: list[Job] = []
        self.process: BaseProcess | None = None

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process:
            self.process.terminate()
            self.process.join(SECONDS_TO_SAVE)
            self.process.kill()

    def test(self, name: str, model: Path, votes: int = 1) -> None:
        self.directory.place_of(test_step(name))  # it gets its number in its turn
        self._later(Job(test_step(name), "test", (name, model, votes)))

    def test_length(self) -> None:
        if self.results.lengths_differ:
            self.directory.place_of(test_step(LONGER))
            self._later(Job(test_step(LONGER), "test_length", ()))

    def ask_wrong_labels(self, name: str, prover: Path) -> None:
        self.directory.place_of(name)
        self._later(Job(name, "ask_wrong_labels", (name, prover)))

    def weigh_signals(self, name: str, prover: Path, judge: Path, judged: Path) -> None:
        if self.results.run.settings.signals:
            self.directory.place_of(name)
            self._later(Job(name, "weigh_signals", (name, prover, judge, judged)))

    def compare(self, name: str, step: str, stage: str, data: Sequence[Path], times: float = 1) -> None:
        self._later(Job(test_step(name), "compare", (name, step, stage, data, times)))

    def _later(self, job: Job) -> None:
        path = step_paths(self.directory.root).get(job.step, self.directory.root / f"steps/ahead-{job.step}")
        if job in self.jobs or (path / "done.json").is_file():
            return
        self.jobs.append(job)
        if not self.process:
            self._start()
        self._send(job)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of what runs threads is no fresh start
        theirs, self.pipe = context.Pipe(duplex=False)
        self.place.mkdir()
        arguments = theirs, self.results, self.place
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.directory.say(f"tests and baselines: in a second process, which speaks into {self.place}/log")

    def _send(self, job: Job | None) -> None:
        with contextlib.suppress(OSError):  # it has died: what it was to do is done in the second pass
            self.pipe.send(job)

    def finish(self) -> None:
        """What is left is shared: the second process takes the first of it, this one the last."""
        if not self.process:
            return
        for job in reversed(self.jobs):
            job.do(self.results, self.place)
        self._send(None)
        self.process.join(1)
        if self.process.is_alive():
            self.directory.say(f"waiting for the second process: see {self.place}/log")
        self.process.join()
        if status := self.process.exitcode:
            self.directory.say(
                f"warning: the second process ended with status {status}, see {self.place}/log; what it left "
                "undone is done now"
            )
        else:
            shutil.rmtree(self.place)
        remove_leftovers(self.directory.root)  # its claims


# ---------------------------------------------------------------------------------- the second process


def work(pipe: Connection, results: Results, place: Path) -> None:
    """Does its jobs, one after the other, until it is told that there are no more."""
    os.setpgrp()  # Ctrl-C is for the first process, which then stops this one
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.exit(exit_status(do_jobs, pipe, results, place))


def do_jobs(pipe: Connection, results: Results, place: Path) -> None:
    from gramr2 import parallel

    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(pipe, jobs), daemon=True).start()
    results.run.directory.says = only_its_name  # where the run stands is for the first process to say
    only = only_writer(place.parent / "steps", is_directory=True)
    with stop_on_interrupt(), only, parallel.join_ranks(results.run.trainings["reward"]):
        for job in iter(jobs.get, None):
            job.do(results, place)


def listen(pipe: Connection, jobs: queue.SimpleQueue[Job | None]) -> None:
    """Takes in jobs; without the other end, the first process is gone, and nobody would end this one."""
    while True:
        try:
            jobs.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(130)
