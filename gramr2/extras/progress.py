"""Where a self-training run stands: step 7 of 31, what it does, about how long it will still take.

What steps there will be is known by going through the loop once with `Walk` in the place of `Run` and of
`Results`: it writes down what is asked of it, and does nothing. Each time a step begins, a line says which it
is, and the report is written anew, so that it can be read while the run goes on.

How long is left is said once this run has finished a step of every kind that is still to come: so many
seconds for a row and a sample (of votes, proofs and filters), or for an example of a training. How many rows
a filter will keep is taken from those before it. Where a second process tests and compares meanwhile
(beside.py), it is the longer of what the loop alone has to do, and half of everything.

It leaves out: bars within a step (run_directory.py, fit.py).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gramr2.extras.beside import is_worth_it
from gramr2.extras.inputs import HELD_OUT, RunInputs
from gramr2.extras.report import Standing, write_report
from gramr2.extras.results import LONGER, Results, RunReader, test_step
from gramr2.files import InputError, disk_errors_as_input_errors, need
from gramr2.run_directory import StoppedAsAsked
from gramr2.settings import TrainSettings
from gramr2.steps import Run

REPORTS = 0.01  # of a run's time may go into its reports
# What a step does, and where it stands in figure 2 as selftrain.py:self_train counts; 0: it only measures.
STEPS = {
    "prover": (1, "the prover learns to justify a given label"),
    "wrong-labels": (0, "the prover is asked for wrong labels too"),
    "prove-labelled": (2, "the prover writes rationales for the labelled pairs"),
    "filter-labelled": (2, "unreliable rationales are filtered out"),
    "initial": (3, "the first reward model is trained"),
    "predict": (4, "the reward model labels unlabelled pairs"),
    "signals": (0, "what knows that a label is wrong is weighed"),
    "labels": (4, "labels that it is not sure of are filtered out"),
    "prove": (5, "the prover writes the rationales"),
    "rationales": (5, "unreliable rationales are filtered out"),
    "train": (6, "the reward model is trained again, on all of them"),
    "fine-tune": (7, "the last fine-tuning, on human rationales"),
    "test": (0, "a model is tested on held-out pairs"),
    "discriminative": (0, "a baseline is trained, with a scalar head"),
    "generative": (0, "a baseline is trained, on labels alone"),
    "labelled-2x": (0, "the control is trained, on labelled pairs alone"),
}


class Planned(NamedTuple):
    """A step to come. Its work is `each` for each row of its files, or `fixed`."""

    name: str
    kind: str  # steps of a kind are about as fast, and those that are `like` each other the same
    like: str
    files: Sequence[Path]
    each: float
    limit: float = math.inf  # rows
    fixed: float = 0
    batch: int = 1
    beside: bool = False  # of those that the loop does not wait for


class Walk:
    """Stands in the place of `Run` and of `Results`; a step's directory is its name."""

    def __init__(self, run: Run, inputs: RunInputs):
        self.settings, self.trainings, self.inputs = run.settings, run.trainings, inputs
        self.lengths_differ = Results(run, inputs).lengths_differ
        self.directory, self.paths, self.steps = self, dict[str, Path](), list[Planned]()

    def _add(self, *step: Any, **more: Any) -> Path:
        self.steps.append(Planned(*step, **more))
        return self.paths.setdefault(step[0], Path(step[0]))

    def train(
        self, name: str, stage: str, data: Sequence[Path], start: Path, times: float = 1, beside: bool = False
    ) -> Path:
        s: TrainSettings = self.trainings[stage]
        work = times * s.epochs, s.limit or math.inf, round(times * s.steps) * s.batch_size, s.batch_size
        return self._add(name, "train", stage, data, *work, beside) / "model"

    def prove(self, name: str, prover: Path, pairs: Path) -> Path:
        return self._add(name, "prove", "pairs", [pairs], self.settings.k) / "proofs.jsonl"

    def judge(self, name: str, model: Path, pairs: Path, votes: int, limit: int = 0, **more: Any) -> Path:
        work = votes, limit or math.inf
        return self._add(name, "judge", f"{votes} votes", [pairs], *work, **more) / "judged.jsonl"

    def filter_labels(self, name: str, judged: Path, number: int) -> Path:
        return self.filter_rationales(name, judged)

    def filter_rationales(self, name: str, proofs: Path) -> Path:
        return self._add(name, "filter", "pairs", [proofs], 1) / "kept.jsonl"

    def test(self, name: str, model: Path, votes: int = 1) -> None:
        self.judge(test_step(name), model, self.inputs.test, votes, self.settings.test_limit, beside=True)

    def test_length(self) -> None:
        if self.lengths_differ:
            self._add(test_step(LONGER), "filter", "lengths", [self.inputs.test], 1, beside=True)

    def compare(self, name: str, step: str, stage: str, data: Sequence[Path], times: float = 1) -> None:
        self.test(name, self.train(step, stage, data, self.inputs.backbone, times, beside=True))

    def ask_wrong_labels(self, name: str, prover: Path) -> None:
        self._add(name, "prove", "both sides", [self.inputs.held_out], 2, beside=True)

    def weigh_signals(self, name: str, prover: Path, judge: Path, judged: Path) -> None:
        if self.settings.signals:
            work = 2 * self.settings.k, self.settings.signals
            self._add(name, "prove", "signals", [judged], *work, beside=True)


class Progress:
    """What a run says of itself as its steps begin. Only the first rank's is ever asked."""

    def __init__(
        self, run: Run, inputs: RunInputs, loop: Callable[..., None], baselines: Callable[..., None]
    ):
        self.directory, self.side_by_side = run.directory, is_worth_it(run)
        walk, until = Walk(run, inputs), run.directory.until
        loop(walk, inputs, walk)
        # The tests of the last model, which wait for all of the loop.
        last = max(number for number, step in enumerate(walk.steps) if not step.beside)
        self.tail = {step.name for step in walk.steps[last + 1 :]}
        if run.settings.baselines:
            baselines(walk, inputs, walk)
        self.steps = {step.name: step for step in walk.steps}
        self.names = [*run.directory.paths, *self.steps]
        need(until is None or until in self.names, f"--until: no step {until}; all: {', '.join(self.names)}")
        if until:
            self.names = self.names[: self.names.index(until) + 1]
        self.rows = given_rows(run)
        self.written, self.cost = -math.inf, 0.0  # when, and how long it took
        run.directory.says = self.begins

    def begins(self, name: str, path: Path) -> str:
        """The line that a step begins with; and a report, where that costs little."""
        if name not in self.names:
            return f"{path.name} …"
        run = RunReader(self.directory.root)
        text = f"step {self.names.index(name) + 1} of {len(self.names)}, {name}: {in_words(name)}"
        left = self.seconds_left(run)
        text += "" if left is None else f" — about {as_time(left)} left"
        if time.monotonic() - self.written > self.cost / REPORTS:
            self._write(run, text, "going on")
        return text

    @contextlib.contextmanager
    def ends(self) -> Iterator[None]:
        """Whatever ends a run before it has results, its report says; after a kill, that it was going on."""
        try:
            yield
        except BaseException as reason:
            if self.directory.ranks.is_first and not (self.directory.root / "results.json").exists():
                said = {KeyboardInterrupt: "interrupted", StoppedAsAsked: "as asked"}
                found = (text for kind, text in said.items() if isinstance(reason, kind))
                bug = str(reason) if isinstance(reason, InputError) else type(reason).__name__
                with contextlib.suppress(InputError):  # what ended it is what is said
                    self._write(RunReader(self.directory.root), next(found, f"error: {bug}"), "stopped")
            raise

    def _write(self, run: RunReader, text: str, state: str) -> None:
        begun, names = time.monotonic(), set(self.names)
        standing = Standing(state, text, time.time(), len(names & run.steps.keys()), len(names))
        with disk_errors_as_input_errors(run.root):
            write_report(run.root, standing)
        self.written, self.cost = time.monotonic(), time.monotonic() - begun

    # ------------------------------------------------------------------ how long

    def seconds_left(self, run: RunReader) -> float | None:
        """For what is still to do; None while no step of its kind has been finished."""
        seconds, speeds = {}, self._speeds(run)
        for name in self.names:
            if name in self.steps and name not in run.steps:
                step = self.steps[name]
                speed = speeds.get((step.kind, step.like), speeds.get((step.kind, "")))
                if speed is None:
                    return None
                seconds[name] = speed * max(0, self._work(run, step) - done_already(run, step))
        if not self.side_by_side:
            return sum(seconds.values())
        loop = sum(value for name, value in seconds.items() if not self.steps[name].beside)
        tests = max((value for name, value in seconds.items() if name in self.tail), default=0)
        return max(loop + tests, sum(seconds.values()) / 2)

    def _speeds(self, run: RunReader) -> dict[tuple[str, str], float]:
        """Seconds for a unit of work, by the last finished step that was like it, and of its kind."""
        found = {}
        for name, step in self.steps.items():
            record = run.done(name)
            # A training's own figure, in its counts, is over all starts; of another step, all but the last
            # start's seconds are lost.
            seconds = max(record.get("seconds", 0), record["counts"].get("seconds", 0))
            known = seconds and (step.kind == "train" or not record["resumed"])
            if known and (work := self._work(run, step)):
                found[step.kind, step.like] = found[step.kind, ""] = seconds / work
        return found

    def _work(self, run: RunReader, step: Planned) -> float:
        return step.fixed or step.each * min(step.limit, sum(self._rows(run, file) for file in step.files))

    def _rows(self, run: RunReader, file: Path) -> float:
        """Of a file: as counted, or as the filters have kept so far."""
        step = self.steps.get(file.parent.name)
        if step is None:
            return self.rows[file.stem]
        came = min(step.limit, sum(self._rows(run, each) for each in step.files))
        if step.kind != "filter":
            return came
        filters = [name for name, each in self.steps.items() if each[1:3] == step[1:3] and name in run.steps]
        counts = [run.done(name)["counts"] for name in [step.name] * (step.name in run.steps) or filters]
        into = sum(each["in"] for each in counts)
        return came * sum(each["kept"] for each in counts) / into if into else came


def given_rows(run: Run) -> Mapping[str, float]:
    """Of the files that the step `data` has left, by name."""
    counts, settings = run.directory.counts["data"], run.settings
    share = settings.pool or counts["unlabelled"] // settings.iters
    batches = {f"unlabelled-{number + 1}": share for number in range(settings.iters)}
    return {**counts, **batches, "held_out": min(HELD_OUT, counts["labelled"])}


def done_already(run: RunReader, step: Planned) -> float:
    """The work of a step that was begun: a row of metrics for each batch, a shard's name for its rows."""
    path = run.paths.get(step.name, Path("/"))
    if step.kind == "train":
        metrics = path / "metrics.jsonl"
        return step.batch * metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
    ends = (map(int, shard.stem.split("-")) for shard in path.glob("shards/*.jsonl"))
    return step.each * sum(stop - start for start, stop in ends)


def in_words(name: str) -> str:
    key = "test" if name.startswith("test-") else name.split("-", 2)[2] if name.startswith("round-") else name
    number, text = STEPS[key]
    return text + f" (figure 2, {number})" * bool(number)


def as_time(seconds: float) -> str:
    """Rounded: it is a guess."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{10 * max(1, round(seconds / 10))} s"
