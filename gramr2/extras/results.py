"""What a self-training run came to: its tables as they grow, results.json, and the last lines of the command.

`Results` tests each model on the held-out pairs as the run goes on, and at the end counts what became of
every pair of every round. `RunReader` opens a run's directory afterwards, also one that was interrupted: for
this, for the report (report.py), and for whoever compares runs. results.json has one owner, which is here.

The hidden truth is opened here alone: for these counts, for the report and for signals.py. It leaves out:
the page (report.py), other benchmarks and intervals (evaluate.py).
"""

from __future__ import annotations

import math
import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from gramr2.extras.evaluate import average, by_domain, is_right
from gramr2.extras.inputs import RunInputs
from gramr2.fields import Fields
from gramr2.files import (
    InputError,
    JsonRow,
    as_started,
    read_json,
    read_rows,
    write_json,
    write_rows,
)
from gramr2.records import OTHER
from gramr2.run_directory import read_record, step_paths
from gramr2.seals import read_signed

if TYPE_CHECKING:
    from gramr2.steps import Run

# The stages that a pair of a round passes, or at one of which it is dropped.
FUNNEL = ("judged", "agreed", "confident", "wellformed", "kept")
LONGER = "longer response"
CONTROL = "labelled only, 2x steps"
ORDER = (
    "longer",
    "backbone",
    "discriminative",
    "generative",
    "initial",
    "round",
    "labelled",
    "fine",
    "voting",
)


# ---------------------------------------------------------------------------------- while a run goes on


class Results:
    """What is tested as the run goes, and what results.json will say of it."""

    def __init__(self, run: Run, inputs: RunInputs):
        self.run, self.inputs, self.model = run, inputs, inputs.backbone
        self.models: dict[str, Path] = {}  # by what is tested

    def test(self, name: str, model: Path, votes: int = 1, baseline: bool = False) -> None:
        """A model on the held-out pairs; a single vote is greedy and in the given order."""
        self.run.judge(test_step(name), model, self.inputs.test, votes, self.run.settings.test_limit)
        self.models[name], self.model = model, self.model if baseline else model

    @property
    def lengths_differ(self) -> bool:
        """Whether the rule has anything to say: the toy's responses are all of one length."""
        return any(by_length(row) for row in read_rows(self.inputs.test))

    def test_length(self) -> None:
        """What the rule gets right that the longer response is better: a model should be above it."""
        if not self.lengths_differ:
            return
        with self.run.directory.step(test_step(LONGER)) as step:
            if step.to_do:
                tested = self.inputs.test, self.run.settings.test_limit or None
                step.close(self.run.ranks.on_rank_0(lambda: judge_by_length(*tested, step.path)))

    def compare(self, name: str, step: str, stage: str, data: Sequence[Path], times: float = 1) -> None:
        """A baseline: a model that the step trains from the backbone, and its accuracy under `name`."""
        model = self.run.train(step, stage, data, self.inputs.backbone, times)
        self.test(name, model, baseline=True)

    def ask_wrong_labels(self, name: str, prover: Path) -> None:
        """Whether the prover argues for wrong labels as well as for right ones, on held-out pairs."""
        from gramr2.extras.wrong_labels import ask_wrong_labels  # brings torch, which reading a run does not

        ask_wrong_labels(self.run, name, prover, self.inputs.held_out)

    def weigh_signals(self, name: str, prover: Path, judge: Path, judged: Path) -> None:
        """What knows that a pseudo-label is wrong, where that is asked for and the truth is known."""
        from gramr2.extras.signals import weigh_signals

        if self.run.settings.signals:
            truth = RunReader(self.run.directory.root).truth()
            weigh_signals(self.run, name, prover, judge, judged, truth)

    def write(self, stopped: str = "") -> JsonRow:
        """results.json, also of a run that could not go on, and a pair to try the model on."""
        root = self.run.directory.root
        results = self.to_json(stopped)
        write_json(root / "pair.json", next(read_rows(self.inputs.test)))
        write_json(root / "results.json", results)
        return results

    def to_json(self, stopped: str) -> JsonRow:
        directory, reader = self.run.directory, RunReader(self.run.directory.root)
        rows = accuracy_rows(reader, [name for name in reader.steps if name in directory.seconds])
        filtered = [number for number in reader.rounds if f"round-{number}-labels" in directory.counts]
        return {
            "seed": self.run.settings.seed,
            "model": os.path.relpath(self.model, directory.root),
            "seconds": {name: directory.seconds[name] for name in reader.steps if name in directory.seconds},
            "data": directory.counts["data"],
            "rows": rows,
            "gains": list(gains(reader, [row["name"] for row in rows])),
            "prover": directory.counts.get("wrong-labels"),
            "signals": {
                f"round {number}": directory.counts[step]
                for number in filtered
                if (step := f"round-{number}-signals") in directory.counts
            },
            "rounds": [round_counts(reader, number) for number in filtered],
            "stopped": stopped,
            "next": as_started(f"python infer.py --pair {shlex.quote(str(directory.root / 'pair.json'))}"),
        }


def test_step(name: str) -> str:
    """The step that tests what is called `name` in the table."""
    return "test-" + name.replace(" ", "-").replace(",", "")


def tested_name(step: str) -> str:
    """What a step that tests is called in the table."""
    names = {test_step(name): name for name in (CONTROL, "fine-tuned")}
    return names.get(step, step.removeprefix("test-").replace("-", " "))


def accuracy_rows(run: RunReader, steps: Iterable[str]) -> list[JsonRow]:
    """The table, of those among some steps that test."""
    tests = ((tested_name(step), run.rows(step, "judged.jsonl")) for step in steps if step[:5] == "test-")
    rows = [accuracy_row(*test) for test in tests]
    return sorted(rows, key=lambda row: ORDER.index(re.split(r"\W", row["name"])[0]))


def gains(run: RunReader, names: Sequence[str]) -> Iterator[JsonRow]:
    """Points that the last round, and the fine-tuned model, gained over the control, on the same pairs: their
    luck is the same for both."""
    over = CONTROL if CONTROL in names else "initial"
    last = [name for name in names if name.startswith("round")][-1:]
    for name in last + [name for name in names if name == "fine-tuned"]:
        tests = (run.rows(test_step(each), "judged.jsonl") for each in (name, over))
        more = [is_right(ours) - is_right(theirs) for ours, theirs in zip(*tests, strict=True)]
        yield {**average(name, [more]), "over": over}


def judge_by_length(pairs: Path, limit: int | None, place: Path) -> JsonRow:
    """judged.jsonl of the rule. Responses of one length are not judged, which counts as wrong."""
    rows = islice(read_rows(pairs), limit)
    judged = ({"id": row["id"], "label": by_length(row), "pair": row} for row in rows)
    write_rows(place / "judged.jsonl", judged)
    return {}


def by_length(row: JsonRow) -> str | None:
    """The longer response of a pair's row, in characters; None: as long as the other."""
    a, b = len(row["response_a"]), len(row["response_b"])
    return None if a == b else "A" if a > b else "B"


def accuracy_row(name: str, judged: Iterable[JsonRow]) -> JsonRow:
    """One row of results.json: accuracy in per cent over pairs that have a label, and by domain."""
    correct = by_domain(judged, is_right)
    every = average(name, [list(chain(*correct.values()))])
    domains = {domain: round(100 * fmean(hits), 2) for domain, hits in sorted(correct.items())}
    return {"name": name, "accuracy": every.pop("value"), **every, "by_domain": domains}


# ---------------------------------------------------------------------------------- what a run left


class RunReader:
    """A run's directory: its settings, its results if it has any, and its finished steps by name."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not (self.root / "plan.json").is_file():
            raise InputError(f"{root}: holds no plan.json; give the directory of a run, such as runs/toy")
        plan = Fields(read_signed(self.root / "plan.json"), f"{self.root / 'plan.json'}: ")
        self.settings = plan.get("settings", dict)
        path = self.root / "results.json"
        self.results = Fields(read_json(path), f"{path}: ").row if path.is_file() else {}
        # A second process may be ahead with some, which have no number yet (beside.py).
        ahead = {path.name.removeprefix("ahead-"): path for path in self.root.glob("steps/ahead-*")}
        self.paths = step_paths(self.root) | ahead
        self.steps = {name: path for name, path in self.paths.items() if (path / "done.json").exists()}
        judged = range(1, plan.object("settings").get("iters", int, low=1, high=1000) + 1)
        self.rounds = [number for number in judged if f"round-{number}-predict" in self.steps]

    def rows(self, step: str, name: str) -> Iterator[JsonRow]:
        """The rows of a file that a finished step left; none where there is none."""
        if step in self.steps and (self.steps[step] / name).is_file():
            yield from read_rows(self.steps[step] / name)

    def done(self, step: str) -> JsonRow:
        return read_record(self.steps[step] / "done.json") if step in self.steps else {"counts": {}}

    def truth(self) -> dict[str, str]:
        """The hidden labels of the unlabelled pairs, by id, where a file beside them told."""
        return {row["id"]: row["label"] for row in self.rows("data", "truth.jsonl")}

    def passed(self, number: int) -> int:
        """How many of the funnel's stages a round has behind it."""
        done = [f"round-{number}-{step}" in self.steps for step in ("labels", "rationales")]
        return (1, 3, 5)[sum(done)]


@dataclass(slots=True)
class JudgedPair:
    """One pair of a round: its pseudo-label in the given order, and how far it came."""

    id: str
    round: int
    label: str | None
    p_a: float | None  # None: it could not be judged
    truth: str | None
    reached: int  # of FUNNEL
    why: str  # "kept", or "filter: reason"
    turned: bool  # by the balancing of A and B, before it was proved

    @property
    def right(self) -> bool | None:
        return None if None in (self.truth, self.label) else self.label == self.truth

    @property
    def outcome(self) -> str:
        return self.why.partition(":")[0]


def read_round(run: RunReader, number: int, truth: dict[str, str]) -> list[JudgedPair]:
    """Every pair of a round with what became of it: one pass over each file, and no text is kept."""
    name = f"round-{number}-"
    fates: dict[str, tuple[int, str]] = {}
    labels: dict[str, tuple[str | None, int | None]] = {}
    for row in run.rows(name + "labels", "dropped.jsonl"):
        first = row["reason"].startswith(("agreement", "no label", "not judged"))
        fates[row["id"]] = (1 if first else 2, row["reason"])
        if not first:
            labels[row["id"]] = (row["label"], None)
    for row in run.rows(name + "labels", "kept.jsonl"):
        labels[row["id"]] = (row["label"], hash(row["response_a"]))
    for row in run.rows(name + "rationales", "dropped.jsonl"):
        malformed = row["reason"].startswith(("no eligible proof", "structure", "length"))
        fates[row["id"]] = (3 if malformed else 4, row["reason"])
    passed = run.passed(number)
    rest = passed, {1: "not filtered yet", 3: "rationale not filtered yet", 5: "kept"}[passed]
    pairs = []
    for row in run.rows(name + "predict", "judged.jsonl"):
        # From the label filters on, a label is what they made of the votes, and the pair may stand turned.
        label, first_response = labels.get(row["id"], (row.get("label"), None))
        turned = first_response not in (None, hash(row["pair"]["response_a"]))
        label, fate = OTHER[label] if turned else label, fates.get(row["id"], rest)
        known = truth.get(row["id"])
        pairs.append(JudgedPair(row["id"], number, label, row.get("p_a"), known, *fate, turned))
    return pairs


def round_counts(run: RunReader, number: int) -> JsonRow:
    """A round's funnel: pairs at every stage, and where the truth is known how many labels are right."""
    pairs = read_round(run, number, run.truth())
    left: JsonRow = {}
    right: dict[str, float | None] = {}
    for place, stage in enumerate(FUNNEL, 1):
        hits = [pair.right for pair in pairs if pair.reached >= place]
        known = [hit for hit in hits if hit is not None]
        left[stage] = len(hits)
        right[stage] = round(100 * fmean(known), 2) if known else None
    steps = [run.done(f"round-{number}-{step}")["counts"] for step in ("labels", "rationales")]
    left["judged"] = steps[0]["in"]  # with those that could not be
    for name in ("dropped", "alone"):
        left[name] = {each: n for counts in steps for each, n in counts.get(name, {}).items()}
    before, after = right["judged"], right["kept"]
    return {**left, "label_accuracy_before": before, "label_accuracy_after": after, "label_accuracy": right}


# ---------------------------------------------------------------------------------- what a person sees


def lines_of(results: JsonRow, root: Path, again: str) -> Iterator[str]:
    """The end of a run, as a person reads it: one screen. All the rest is in its report."""
    names = sorted({name for row in results["rows"] for name in row["by_domain"]})
    domains = names if 1 < len(names) <= 6 else []
    yield f"{'accuracy, %':26}        95% interval   pairs" + "".join(f"  {name:>10}" for name in domains)
    for row in results["rows"]:
        cells = "".join(f"  {row['by_domain'].get(x, math.nan):{max(10, len(x))}.1f}" for x in domains)
        span = f"{row['low']:5.1f} – {row['high']:5.1f}"
        yield f"{row['name']:26}{row['accuracy']:6.1f}  {span} {row['n']:7}{cells}"
    heads = "".join(f"{head:>12}" for head in (*FUNNEL, "right, %", "of the kept"))
    if results["rounds"]:
        yield f"\n{'labels of pairs':18}{heads}"
    for number, each in enumerate(results["rounds"], 1):
        right = (each[f"label_accuracy_{when}"] for when in ("before", "after"))
        shares = ("" if hit is None else f"{hit:.1f}" for hit in right)
        yield f"round {number:<12}" + "".join(f"{value:>12}" for value in (*map(each.get, FUNNEL), *shares))
    for each in results["gains"]:
        yield "\n" + textwrap.fill(gain_in_words(each), 110)
    yield f"\nmodel:   {os.path.normpath(root / results['model'])}"
    yield f"report:  {root / 'report.html'}, for a browser; its figures: {root / 'results.json'}"
    yield f"steps:   {root / 'steps'}, which took {sum(results['seconds'].values()):,.0f} seconds together"
    yield f"next:\n    {results['next']}\n        judges a pair with the last model"
    yield f"    head -n 2 {shlex.quote(str(root))}/steps/*/dropped.jsonl\n        what was dropped, and why"
    yield f"    {again}\n        the same with another seed, to see what is luck"


def gain_in_words(gain: JsonRow) -> str:
    points = f"{abs(gain['value']):.1f} points {'more' if gain['value'] >= 0 else 'less'} right"
    chance = "That may be chance." if gain["low"] <= 0 <= gain["high"] else "That is more than chance."
    span = f"95% interval, over the same {gain['n']} pairs: {gain['low']:+.1f} to {gain['high']:+.1f}"
    return f"{gain['name']} gets {points} than the control, “{gain['over']}” ({span}). {chance}"
