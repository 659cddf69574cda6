"""Where a self-training run stands: step 7 of 31, what it does, about how long it will still take.

What steps there will be is known by going through the loop once with `Walk` in the place of `Run` and of
`Results`: it writes down what is asked of it, and does nothing. Each time a step begins, a line says which it
is, and the report is written anew, so that it can be read while the run goes on.

How long is left is said once this run has finished a step of every kind that is still to come: so many
seconds for a vote, a proof, a row, or an example of a training. How many rows a filter will keep is taken
from those before it. Where a second process tests and compares meanwhile (beside.py), it is the longer of
what the loop alone has to do, and half of everything.

It leaves out: bars within a step (run_directory.py, fit.py).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gramr2.extras.beside import is_worth_it
from gramr2.extras.inputs import HELD_OUT, RunInputs
from gramr2.extras.report import write_report
from gramr2.extras.results import LONGER, Results, RunReader, test_step
from gramr2.files import InputError, JsonRow, disk_errors_as_input_errors, need
from gramr2.steps import Run

REPORTS = 1, 0.0075  # seconds that may go into a run's reports: so many, and this share of its time


class Planned(NamedTuple):
    """A step to come. Its work is `fixed`, or `each` for each row of its sources, of `limit` at most."""

    name: str
    kind: str  # steps of one kind are as fast as each other, and those of one first word about so
    sources: Sequence[str]  # steps, or files of the step `data`
    each: float = 1
    limit: float = math.inf
    fixed: float = 0
    beside: bool = False  # the run's end alone waits for it


class Walk:
    """Stands in the place of `Run` and of `Results`; a step's directory is its name."""

    def __init__(self, run: Run, inputs: RunInputs):
        self.settings, self.trainings, self.inputs = run.settings, run.trainings, inputs
        self.lengths_differ = Results(run, inputs).lengths_differ
        self.directory, self.paths, self.steps = self, dict[str, Path](), dict[str, Planned]()

    def _add(self, name: str, kind: str, files: Sequence[Path], *work: Any, **more: Any) -> Path:
        sources = [file.parent.name if file.parent.name in self.steps else file.stem for file in files]
        self.steps[name] = Planned(name, kind, sources, *work, **more)
        return self.paths.setdefault(name, Path(name))

    def train(self, name: str, stage: str, data: Sequence[Path], start: Path, times: float = 1, **more: Any):
        s = self.trainings[stage]
        work = times * s.epochs / s.batch_size, s.limit or math.inf, times * s.steps
        return self._add(name, f"train {stage}", data, *work, **more) / "model"

    def prove(self, name: str, prover: Path, pairs: Path) -> Path:
        return self._add(name, "prove", [pairs], self.settings.k) / "proofs.jsonl"

    def judge(self, name: str, model: Path, pairs: Path, votes: int, limit: int = 0, **more: Any) -> Path:
        kind = f"vote {votes}" if votes > 1 else "judge"  # one alone takes many times as long
        return self._add(name, kind, [pairs], votes, limit or math.inf, **more) / "judged.jsonl"

    def filter_rationales(self, name: str, rows: Path, *number: int) -> Path:
        return self._add(name, "filter", [rows]) / "kept.jsonl"

    filter_labels = filter_rationales

    def test(self, name: str, model: Path, votes: int = 1) -> None:
        # The test by votes comes last, and is not done before the loop is.
        limit = self.settings.test_limit
        self.judge(test_step(name), model, self.inputs.test, votes, limit, beside=votes == 1)

    def test_length(self) -> None:
        if self.lengths_differ:
            self._add(test_step(LONGER), "filter by length", [self.inputs.test], beside=True)

    def compare(self, name: str, step: str, stage: str, data: Sequence[Path], times: float = 1) -> None:
        self.test(name, self.train(step, stage, data, self.inputs.backbone, times, beside=True))

    def ask_wrong_labels(self, name: str, prover: Path) -> None:
        self._add(name, "prove both", [self.inputs.held_out], 2, beside=True)

    def weigh_signals(self, name: str, prover: Path, judge: Path, judged: Path) -> None:
        if number := self.settings.signals:
            self._add(name, "prove signals", [judged], 2 * self.settings.k, number, beside=True)


class Progress:
    """What a run says of itself as its steps begin. Only the first rank's is ever asked."""

    def __init__(self, run: Run, inputs: RunInputs, loop: Callable, baselines: Callable, says: JsonRow):
        self.root, self.ranks, self.says = run.directory.root, run.ranks, says
        self.side_by_side, walk = is_worth_it(run), Walk(run, inputs)
        loop(walk, inputs, walk)
        if run.settings.baselines:
            baselines(walk, inputs, walk)
        self.steps, self.names, until = walk.steps, [*run.directory.paths, *walk.steps], run.directory.until
        need(until in (None, *self.names), f"--until: no step {until}; there are {', '.join(self.names)}")
        self.names = self.names[: self.names.index(until) + 1] if until else self.names
        # Rows of the files that the step `data` has left, by name.
        counts, settings = run.directory.counts["data"], run.settings
        share = settings.pool or counts["unlabelled"] // settings.iters
        self.rows = counts | {f"unlabelled-{number + 1}": share for number in range(settings.iters)}
        self.rows["held_out"] = min(HELD_OUT, counts["labelled"])
        self.begun, self.spent = time.monotonic(), 0.0  # on reports
        run.directory.says = self.begins

    def begins(self, name: str, path: Path) -> str:
        """The line that a step begins with; and a report, where that costs little."""
        run, key = RunReader(self.root), "test" if name.startswith("test-") else name
        left = "" if (seconds := self.seconds_left(run)) is None else f" — {as_time(seconds)} left"
        words = self.says[key.split("-", 2)[2] if key.startswith("round-") else key]
        text = f"step {self.names.index(name) + 1} of {len(self.names)}, {name}: {words}{left}"
        if self.spent <= REPORTS[0] + REPORTS[1] * (time.monotonic() - self.begun):
            self._write(run, text, "going on")
        return text

    @contextlib.contextmanager
    def ends(self) -> Iterator[None]:
        """Whatever ends a run that has no results, its report says; but for a kill."""
        try:
            yield
        except BaseException as reason:
            if self.ranks.is_first:
                with contextlib.suppress(InputError):  # what ended it is what is said
                    self._write(RunReader(self.root), str(reason) or "interrupted", "stopped")
            raise

    def _write(self, run: RunReader, text: str, state: str) -> None:
        begun, done = time.monotonic(), len(run.steps.keys() & {*self.names})
        with disk_errors_as_input_errors(self.root):
            standing = {"state": state, "says": text, "at": time.time(), "done": done}
            write_report(self.root, standing | {"steps": len(self.names)})
        self.spent += time.monotonic() - begun

    # ------------------------------------------------------------------ how long

    def seconds_left(self, run: RunReader) -> float | None:
        """For what is still to do; None while no step of its kind has been finished."""
        done = {name: run.done(name) for name in run.steps}
        works, speeds, seconds = self._works(done), dict[str, float](), dict[str, float]()
        for step in (step for name, step in self.steps.items() if name in done and works[name]):
            # What a training counts is over all starts; of another step that was cut, seconds are lost.
            spent = max(done[step.name]["seconds"], done[step.name]["counts"].get("seconds", 0))
            if not done[step.name]["resumed"]:
                speeds[step.kind] = speeds[step.kind.split()[0]] = spent / works[step.name]
        for step in (self.steps[name] for name in self.names if name in self.steps and name not in done):
            speed = speeds.get(step.kind, speeds.get(step.kind.split()[0]))
            if speed is None:
                return None
            behind = done_already(step, run.paths.get(step.name, self.root))
            seconds[step.name] = speed * max(0, works[step.name] - behind)
        loop = sum(value for name, value in seconds.items() if not self.steps[name].beside)
        every = sum(seconds.values())
        return max(loop, every / 2) if self.side_by_side else every

    def _works(self, done: dict[str, JsonRow]) -> dict[str, float]:
        """The work of every step, whose rows the steps before it leave: those of a filter that is to come, as
        many as the filters before it have kept."""
        rows, works = dict(self.rows), {}
        filters = [each["counts"] for each in done.values() if "kept" in each["counts"]]
        kept, into = (sum(each[key] for each in filters) for key in ("kept", "in"))
        share = kept / into if into else 1
        for step in self.steps.values():
            came = min(step.limit, sum(rows[source] for source in step.sources))
            works[step.name] = step.fixed or step.each * came
            left = came * share if step.kind == "filter" else came
            rows[step.name] = done[step.name]["counts"].get("kept", left) if step.name in done else left
        return works


def done_already(step: Planned, path: Path) -> float:
    """The work of a step that was begun: a training's rows of metrics, or the rows that name its shards."""
    if (metrics := path / "metrics.jsonl").is_file():
        return metrics.read_bytes().count(b"\n")
    ends = (map(int, shard.stem.split("-")) for shard in path.glob("shards/*.jsonl"))
    return step.each * sum(stop - start for start, stop in ends)


def as_time(seconds: float) -> str:
    """Rounded: it is a guess."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {10 * max(1, round(seconds / 10))} s"
