"""The directory of a self-training run: what it was begun with, and its steps, each done once.

`plan.json` says what a run was begun with: settings, hashes of the inputs and of the code. A step has a
directory `steps/NN-name/`, numbered in the order in which steps were begun, and is closed by its `done.json`
(counts, seconds, a seal of every file that it left). A step that is closed is never done again; one that is
not goes on from its finished shards. So the same command after a kill goes on, and ends with the same
results; other settings under the same name, other inputs, and files that are no longer what a step left, are
refused by name.

    with directory.step("prove-labelled") as step:
        if step.to_do:
            with ranks.errors_on_all_ranks():
                for shard, pairs in step.shards(Store(path, Pair.from_json)):
                    write_shard(shard, ...)
            counts = ranks.on_rank_0(...)  # reads step.rows(), and writes what the step leaves
            step.close(counts)

Work on many rows is cut into fixed shards, which ranks take as they become free: whoever makes a shard's
claim file has it. A shard is published whole, and ends with what its rows hash to: one that a kill cut, or
that was damaged, is done again whole. Rows pass between ranks through the file system alone, and only the
shard in hand is held in memory.

It leaves out: what the steps do (steps.py), and what becomes of a finished run (extras/results.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gramr2.fields import Fields
from gramr2.files import (
    InputError,
    JsonRow,
    disk_errors_as_input_errors,
    need,
    parse_json,
    publish_file,
    read_json,
    short_hash,
)
from gramr2.seals import CARD, check_seals, names_below, read_signed, seal, seals_below, write_signed
from gramr2.settings import FREE, PAIRS_PER_CALL, check_identity, pairs_per_call

if TYPE_CHECKING:  # torch takes its seconds, and looking for a run needs none of it
    from gramr2.parallel import Ranks

T = TypeVar("T")
WRITTEN = ("plan.json", "results.json", "pair.json", "report.html")  # beside the steps
OURS_BEFORE_A_PLAN = r"\.(lock$|plan\.json\.tmp-)"
NOT_SEALED = ("resume", "calibration.json", CARD)  # a user may calibrate a model where it stands
# A done.json; `resumed`: an earlier start did some of its shards, in seconds that are not counted.
RECORD: JsonRow = {"counts": [dict], "seconds": [float], "files": [dict], "resumed": [bool, False]}


def finished_runs() -> list[Path]:
    """The self-training runs under runs/ that have results, the one that finished last first."""
    results = sorted(Path("runs").glob("*/results.json"), key=lambda path: -path.stat().st_mtime)
    return [path.parent for path in results]


def model_of(run: Path) -> Path:
    """The last model of a finished run, as its results name it."""
    return run / Fields(read_json(run / "results.json"), f"{run / 'results.json'}: ").get("model", str)


def step_paths(root: Path) -> dict[str, Path]:
    """A run's step directories by name, in the order of their numbers. What has none is not the run's."""
    found = [(re.fullmatch(r"(\d+)-(.+)", path.name), path) for path in (root / "steps").glob("*")]
    numbered = sorted((int(name[1]), name[2], path) for name, path in found if name)
    return {name: path for _, name, path in numbered}


def shard_rows(rows: int, ranks: Ranks) -> int:
    """A shard is one generate call, which is all that a kill loses; or less, so that each rank gets one."""
    return min(pairs_per_call(ranks.device.type), max(PAIRS_PER_CALL, math.ceil(rows / ranks.size)))


def code_version() -> str:
    """A hash of the package's sources and of the kernels': a run that other code continues says so."""
    package = Path(__file__).parent
    prompts = package.glob("templates/*.txt")
    sources = sorted([*package.rglob("*.py"), *prompts, *package.glob("kernels/*.py")])
    return short_hash(b"".join(path.read_bytes() for path in sources))


class StoppedAsAsked(Exception):
    """The step after which a run was asked to stop is done."""


@dataclass
class Step:
    """A step's directory, and the record that it was closed with: None while it is still to be done."""

    path: Path
    ranks: Ranks
    record: JsonRow | None
    started: float
    resumed: bool = False
    shard_paths: list[Path] = field(default_factory=list)

    @property
    def to_do(self) -> bool:
        return self.record is None

    def shards(self, rows: Sequence[T]) -> Iterator[tuple[Path, Sequence[T]]]:
        """Of the shards of `rows`, those that fall to this rank: the file to publish, and its rows."""
        size = shard_rows(len(rows), self.ranks)
        with self.ranks.bar(len(rows), desc=self.path.name, unit="pair", leave=False) as bar:
            for start in range(0, len(rows), size):
                stop = min(start + size, len(rows))
                # Both ends in its name: where the run goes on with shards of another size, these are others.
                shard = self.path / "shards" / f"{start:09}-{stop:09}.jsonl"
                self.shard_paths.append(shard)
                # The claim comes first: a name that was never looked up is not remembered as absent.
                if claim(shard) and not (shard.is_file() and is_whole(shard)):
                    yield shard, rows[start:stop]
                bar.update(stop - start)

    def rows(self) -> Iterator[JsonRow]:
        """What the shards hold, in order, once every rank is through. They are opened by their names: a
        listing of a directory that hosts share may be a minute old."""
        for shard in self.shard_paths:
            yield from read_shard(shard)

    def close(self, counts: JsonRow) -> None:
        """The step is done, and its shards are no longer needed; every rank says so, and the first writes."""
        self.record = self.ranks.on_rank_0(lambda: self._close(counts))

    def _close(self, counts: JsonRow) -> JsonRow:
        shutil.rmtree(self.path / "shards", ignore_errors=True)
        seconds = time.perf_counter() - self.started
        files = seals_below(self.path, NOT_SEALED)
        record = {"counts": counts, "seconds": seconds, "files": files, "resumed": self.resumed}
        write_signed(self.path / "done.json", record)
        return read_record(self.path / "done.json")


def read_record(done: Path) -> JsonRow:
    """What a step was closed with."""
    fields = Fields(read_signed(done), f"{done}: ")
    return {name: fields.get(name, *kind) for name, kind in RECORD.items()}


def write_shard(shard: Path, rows: Iterable[JsonRow]) -> None:
    """Publishes a shard: a line for each row, and then the hash of these lines."""
    lines = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    with publish_file(shard) as temporary:
        temporary.write_bytes(lines + short_hash(lines).encode())


def read_shard(shard: Path) -> list[JsonRow]:
    content = shard.read_bytes()
    end = content.rfind(b"\n") + 1
    if short_hash(content[:end]).encode() != content[end:]:
        raise InputError(f"{shard}: is damaged; run the same command again, and it is made anew")
    return [parse_json(line) for line in content[:end].split(b"\n")[:-1]]


def is_whole(shard: Path) -> bool:
    try:
        read_shard(shard)
    except ValueError:
        print(f"warning: {shard}: is damaged, and is done again", file=sys.stderr)
        return False
    return True


def claim(shard: Path) -> bool:
    """Whether this rank may do a shard; the file system gives it to one alone, whatever host asks."""
    shard.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        shard.with_suffix(".claim").touch(exist_ok=False)
        return True
    return False


def only_its_name(name: str, path: Path) -> str:
    return f"{path.name} …"


class RunDirectory:
    """A run's directory, its plan and its steps. `until` names the step after which to stop."""

    def __init__(
        self, root: Path, begun_with: JsonRow, inputs: Iterable[Path], ranks: Ranks,
        until: str | None = None, verify: bool = False,
    ):  # fmt: skip
        self.root, self.ranks, self.until, self.verify = Path(root), ranks, until, verify
        self.says: Callable[[str, Path], str] = only_its_name  # of a step that begins: its name, its place
        self.ahead = False  # in a process beside the run's own: steps that it begins are numbered later
        self.paths: dict[str, Path] = {}  # of the steps that this process has come to, by name
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, JsonRow] = {}
        ranks.on_rank_0(lambda: self._begin(begun_with, inputs))

    def say(self, text: str) -> None:
        if self.ranks.is_first:
            print(text, file=sys.stderr, flush=True)

    def _begin(self, begun_with: JsonRow, inputs: Iterable[Path]) -> None:
        """Settings and inputs must be what they were. Other code is allowed, and said."""
        plan = self.root / "plan.json"
        theirs = [each for each in self.root.glob("*") if not re.match(OURS_BEFORE_A_PLAN, each.name)]
        need(plan.exists() or not theirs, f"{self.root}: holds files, but no plan.json: it is no run of ours")
        before = Fields(read_signed(plan) if plan.exists() else {}, f"{plan}: ")
        begun = any(self.root.glob("steps/*/done.json"))
        known = before.get("inputs", dict, {})
        seals = {str(path): seal(path, known.get(str(path)), self.verify) for path in inputs}
        now = {"settings": begun_with, "inputs": seals, "code": code_version()}
        if not begun:  # before a step is closed, all of it may change
            with disk_errors_as_input_errors(self.root):
                write_signed(plan, now)
            remove_leftovers(self.root)
            return
        found = frozen_settings(before.get("settings", dict)) | hashes(known, before.where)
        check_identity(found, frozen_settings(begun_with) | hashes(seals), self.root, "--name")
        remove_leftovers(self.root)
        if before.get("code", str) != now["code"]:
            self.say(f"warning: {self.root} was begun by another version of the code")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Opens a step on every rank. What is still to do is done, and closed, in the `with` block."""
        path, record = self.ranks.on_rank_0(lambda: self._open(name))
        self.paths[name] = path
        step = Step(path, self.ranks, record, time.perf_counter(), any(path.glob("shards/*.jsonl")))
        with disk_errors_as_input_errors(path):
            yield step
        if step.record is None:
            raise RuntimeError(f"{path.name} was left without being closed")
        self.seconds[name], self.counts[name] = round(step.record["seconds"], 3), step.record["counts"]
        if name == self.until:
            raise StoppedAsAsked(f"stopped after {path}, as asked")

    def place_of(self, name: str) -> Path:
        """The directory of a step. Where there is none it is made behind all others, or `ahead` of its turn,
        without a number; the run's own process gives it one when it comes to it."""
        paths, early = step_paths(self.root), self.root / "steps" / f"ahead-{name}"
        last = max((int(path.name.partition("-")[0]) for path in paths.values()), default=0)
        path = paths.get(name, early if self.ahead else early.with_name(f"{last + 1:02}-{name}"))
        with disk_errors_as_input_errors(path):
            if name not in paths and path != early and early.is_dir():
                early.rename(path)
            path.mkdir(parents=True, exist_ok=True)
        return path

    def _open(self, name: str) -> tuple[Path, JsonRow | None]:
        """A step's directory and its record."""
        path = self.place_of(name)
        done = path / "done.json"
        if not done.is_file():
            self.say(self.says(name, path))
            return path, None
        again = f"bring it back, or do this step and all behind it again: --from {name}"
        try:
            record = read_record(done)
        except InputError as error:
            raise InputError(f"{error}; {again}") from None
        check_seals(path, record["files"], again, self.verify)
        for name in {*names_below(path, (*NOT_SEALED, "done.json"))} - record["files"].keys():
            raise InputError(f"{path / name}: the step did not leave it; take it away, or {again}")
        return path, record

    def forget(self, name: str) -> None:
        """Removes a step and all that came after it, so that they are done again."""
        paths = step_paths(self.root)
        known = ", ".join(paths) or "none yet"
        need(name in paths, f"--from: no step {name} in {self.root}; there are {known}")
        names = list(paths)
        with disk_errors_as_input_errors(self.root):
            for concluded in ("results.json", "report.html"):  # from the steps that go
                (self.root / concluded).unlink(missing_ok=True)
            later = [paths[each] for each in names[names.index(name) :]]
            for path in (*(self.root / "steps").glob("ahead-*"), *reversed(later)):  # a kill leaves no gap
                shutil.rmtree(path)


def frozen_settings(plan: JsonRow) -> JsonRow:
    """What may not change between starts, by name: not a training's memory and device."""
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in plan.items()}
    names = ((name, field) for name, part in parts.items() for field in part if field not in FREE)
    frozen = {f"{name} {field}".strip(): parts[name][field] for name, field in names}
    return json.loads(json.dumps(frozen))  # as plan.json gives it back: a tuple of settings comes as a list


def hashes(seals: JsonRow, where: str = "") -> JsonRow:
    return {name: Fields(each, f"{where}{name}: ").get("hash", str) for name, each in seals.items()}


def remove_leftovers(root: Path) -> None:
    """Takes away the claims, and what was half written, of a run that was killed."""
    written = [path for name in WRITTEN for path in root.glob(f".{name}.tmp-*")]
    written += (root / "steps").rglob(".*.tmp-*")
    for left in [*(root / "steps").glob("*/shards/*.claim"), *written]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
