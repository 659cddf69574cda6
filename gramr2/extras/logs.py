"""`--log`: a run's rows in TensorBoard or Weights & Biases, as they are written.

The source is what a run writes down anyhow, metrics.jsonl and the finished tests of a self-training run. A
thread of the first rank reads them as they grow, also those of a second process, and passes them on; so a log
changes nothing of a run, and may be asked for, or left out, at any start. Each stage or step has its own
name, where a value stands at its training step; accuracies of rounds stand under "rounds", at their round.

TensorBoard's files are made anew at each start, from all that there is. What is sent to Weights & Biases is
written down before it is sent, so that a kill may cost it the last rows. No row is in a log twice, though a
training that goes on takes, and writes, its last steps again.

It leaves out: texts, weights, histograms. A log that fails costs a line, and not the run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gramr2.files import InputError, JsonRow, Parser, parse_json, read_json, read_rows, write_json

SECONDS = 2.0  # between two looks at what a run has written


def add_flag(parser: Parser) -> None:
    parser.add_argument("--log", nargs="+", action="extend", default=[], choices=LOGS, help="also log here")


@contextlib.contextmanager
def following(root: Path, names: Sequence[str], stage: str, settings: JsonRow, first: bool) -> Iterator[None]:
    """While the block runs, what is written below `root` is logged. `stage`: whose its own metrics are."""
    begin = {name: beginning(name) for name in names}  # on every rank: all of them, or none, go on
    try:
        logs = [LOGS[name](root, stage, begin[name], settings) for name in begin if first]
    except Exception as error:  # as of who is not logged in
        raise InputError(f"--log {' '.join(names)}: {error}") from None
    ended = threading.Event()
    thread = threading.Thread(target=follow, args=(logs, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def beginning(name: str) -> Callable[..., Any]:
    """What begins a log; or in one line how to install it."""
    try:
        return getattr(importlib.import_module(LOGS[name].module), LOGS[name].function)
    except (ImportError, AttributeError):  # a directory wandb/ is imported as well, and holds nothing
        raise InputError(f'--log {name}: is not installed; pip install "gramr2[{name}]"') from None


def follow(logs: list[TensorBoard | WandB], ended: threading.Event) -> None:
    last = False
    while logs and not last:
        last = ended.wait(SECONDS)  # asked before the look: what was written until then is passed on
        for each in [*logs]:
            try:
                each.add(each.new_rows(), last)
            except Exception as error:  # of any kind: the packages are others', and the run is not theirs
                print(f"warning: --log: {type(each).__name__} ends here: {error!r:.200}", file=sys.stderr)
                logs.remove(each)


class Log:
    """A run's rows, each once. `seen`: the number of the last one, by source: a stage or a step."""

    def __init__(self, root: Path, stage: str, seen: dict[str, int]):
        self.root, self.stage, self.read = root, stage, Counter[tuple[str, int]]()
        there = {stage, *(path.name.partition("-")[2] for path in root.glob("steps/*"))}
        self.seen = {name: seen[name] for name in seen if name in there}  # others will be done again

    def new_rows(self) -> list[tuple]:
        rows = [row for row in self.rows() if row[1] > self.seen.get(row[0], 0)]
        self.seen |= {row[0]: row[1] for row in rows}
        return rows

    def rows(self) -> Iterator[tuple]:
        """Of each its source and its number there; then name, place and values in a log."""
        from gramr2.extras.results import accuracy_row  # --help need not wait for it

        for path in (self.root / "metrics.jsonl", *self.root.glob("steps/*-*/metrics.jsonl")):
            # A step's number may change, and its directory move at this moment.
            name = self.stage if path.parent == self.root else path.parent.name.partition("-")[2]
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                # A file that a training has cut, to go on from there, is another one.
                this = name, os.fstat(file.fileno()).st_ino
                file.seek(self.read[this])
                whole = [line for line in file if line.endswith(b"\n")]
                self.read[this] += sum(map(len, whole))
                for row in map(parse_json, whole):
                    yield name, row["step"], name, row.pop("step"), numbers(row)
        for path in sorted(self.root.glob("steps/*-test-*/judged.jsonl")):
            if (step := path.parent.name.partition("-")[2]) not in self.seen:
                of_round = re.fullmatch(r"test-(?:round-(\d+)|initial)", step)
                place = ("rounds", int(of_round[1] or 0)) if of_round else (step, 0)
                with contextlib.suppress(InputError):  # it moved
                    yield step, 1, *place, numbers(accuracy_row(step, read_rows(path)))


def numbers(row: JsonRow) -> JsonRow:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}


class TensorBoard(Log):
    """ROOT/tensorboard, with a directory for each name."""

    module, function = "torch.utils.tensorboard", "SummaryWriter"

    def __init__(self, root: Path, stage: str, begin: Callable[..., Any], settings: JsonRow):
        super().__init__(root, stage, {})
        # purge_step: for who has the files that go on the screen.
        self.writer = cache(lambda name: begin(str(root / "tensorboard" / name), purge_step=0))
        for old in root.glob("tensorboard/**/events.out.tfevents.*"):
            old.unlink()

    def add(self, rows: Sequence[tuple], last: bool) -> None:
        for _, _, name, place, values in rows:
            for key, value in values.items():
                self.writer(name).add_scalar(key, value, place)
            self.writer(name).flush()


class WandB(Log):
    """A run of Weights & Biases, kept below ROOT/wandb. Its own settings, such as WANDB_MODE, hold."""

    module, function = "wandb", "init"

    def __init__(self, root: Path, stage: str, begin: Callable[..., Any], settings: JsonRow):
        self.path = root / "wandb" / "logged.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = read_json(self.path) if self.path.is_file() else {"id": None, "seen": {}}
        super().__init__(root, stage, before["seen"])
        how: JsonRow = {"project": os.environ.get("WANDB_PROJECT", "gramr2"), "settings": {"console": "off"}}
        how |= {"id": before["id"], "name": root.name, "dir": root, "config": settings, "resume": "allow"}
        self.run = begin(**how)

    def add(self, rows: Sequence[tuple], last: bool) -> None:
        if rows:
            write_json(self.path, {"id": self.run.id, "seen": self.seen})
        for _, _, name, place, values in rows:
            self.run.define_metric(f"{name}/*", step_metric=f"{name}/step")
            self.run.log({f"{name}/{key}": value for key, value in {**values, "step": place}.items()})
        if last:
            self.run.finish()


LOGS: dict[str, type[TensorBoard | WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}
