"""The books of a run, and the steps that are written into them.

A run is a directory. `plan.json` says what it was begun with: settings, hashes of the inputs and of the
code. Each step writes into `steps/NN-name/` and closes it with `done.json` (counts, seconds, hashes of what
it left). A step that is closed is never done again; one that is not goes on from its finished shards. The
same command after a kill therefore goes on, and ends with the same results; other settings under the same
name are refused, field by field.

`Run` has the steps of the paper's loop, each from files to files: train, prove, judge, the two filters, and
the check of the prover on wrong labels. Work on many pairs is cut into fixed shards. Under torchrun the ranks
take shards as they become free: whoever makes a shard's claim file has it. A shard is published whole, so a
cut one is done again whole, and the same seed gives the same rows on any number of ranks. Rows pass between
ranks through the file system alone, and only the shard in hand is held in memory.

It leaves out: the order of the steps (selftrain.py), and everything about the truth: no step here is given a
label that the run did not start with or make itself (extras/evaluate.py compares afterwards).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gramr2 import denoise, files, fit, parallel
from gramr2.data import Store
from gramr2.files import (
    InputError,
    JsonRow,
    digest,
    disk_errors_as_input_errors,
    publish_file,
    read_json,
    write_json,
    write_rows,
)
from gramr2.judge import PAIRS_PER_CALL, RewardModel
from gramr2.prover import Prover, label_coherence, rationale_of, select
from gramr2.records import Judgment, Pair
from gramr2.settings import FREE, SelfTrainSettings, TrainSettings, check_identity

# Proofs of wrong labels that pass every rule, as a share of those of right ones: above it, a warning.
DECEPTIVE = 0.5
SHOWN = 4  # pairs of each shard whose k proofs are all written down, for the report to show their ranking


def code_version() -> str:
    """A hash of the package's sources and of the kernels': a run that other code continues says so."""
    here = Path(__file__).parent
    sources = sorted([*here.rglob("*.py"), *here.parent.glob("kernels/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


class StoppedAsAsked(Exception):
    """The step after which a run was asked to stop is done."""


class NothingKept(InputError):
    """The loop cannot go on: nothing is left to train on. What was reached stands."""


class Books:
    """A run's directory, its plan and its steps. `until` names the step after which to stop."""

    def __init__(
        self,
        root: Path,
        settings: dict[str, Any],
        inputs: Iterable[Path],
        ranks: parallel.Ranks,
        until: str | None = None,
    ):
        self.root, self.ranks, self.until = Path(root), ranks, until
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, JsonRow] = {}
        self._numbers: dict[str, int] = {}
        ranks.on_rank_0(lambda: self._open(settings, inputs))

    def say(self, text: str) -> None:
        if self.ranks.is_first:
            print(text, file=sys.stderr, flush=True)

    def _open(self, settings: dict[str, Any], inputs: Iterable[Path]) -> None:
        """Settings and inputs must be what they were. Other code is allowed, and said."""
        clear(self.root)
        hashes = {str(path): digest(path) for path in inputs}
        # As plan.json gives it back: a tuple of settings comes as a list.
        now = json.loads(json.dumps({"settings": settings, "inputs": hashes, "code": code_version()}))
        written = self.root / "plan.json"
        if not any(self.root.glob("steps/*/done.json")):  # what has done nothing yet is bound to nothing
            with disk_errors_as_input_errors(self.root):
                write_json(written, now)
        before = read_json(written)
        identities = (held(plan["settings"] | plan["inputs"]) for plan in (before, now))
        check_identity(*identities, self.root, "--name")
        if before["code"] != now["code"]:
            self.say(f"warning: {self.root} was begun by another version of the code")

    def place(self, name: str) -> Path:
        """steps/NN-name, numbered in the order in which steps are first asked for."""
        return self.root / "steps" / f"{self._numbers.setdefault(name, len(self._numbers) + 1):02}-{name}"

    def step(self, name: str, work: Callable[[Path], JsonRow]) -> JsonRow:
        """Does a step unless it is done; → its counts. Every rank calls `work` with the step's directory."""
        place = self.place(name)
        done = place / "done.json"
        record = self.ranks.on_rank_0(lambda: read_json(done) if done.is_file() else None)
        if record is None:
            self.say(f"{place.name} …")
            started = time.perf_counter()
            with disk_errors_as_input_errors(place):
                self.ranks.on_rank_0(lambda: place.mkdir(parents=True, exist_ok=True))
                counts = work(place)
                seconds = time.perf_counter() - started
                record = self.ranks.on_rank_0(lambda: close(place, counts, seconds))
        self.seconds[name], self.counts[name] = round(record["seconds"], 3), record["counts"]
        if name == self.until:
            raise StoppedAsAsked(place)
        return record["counts"]

    def forget(self, name: str) -> None:
        """Removes a step and all that came after it, so that they are done again."""
        places = files.steps_of(self.root)
        if name not in places:
            known = ", ".join(places) or "none yet"
            raise InputError(f"--from: no step {name} in {self.root}; there are {known}")
        for said in ("results.json", "report.html"):  # of the steps that go
            (self.root / said).unlink(missing_ok=True)
        for each in reversed(places):  # the last first: a kill leaves no gap
            shutil.rmtree(places[each])
            if each == name:
                break


def held(plan: JsonRow) -> JsonRow:
    """What may not change between starts, by name: not a training's memory and device."""
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in plan.items()}
    names = ((name, field) for name, part in parts.items() for field in part if field not in FREE)
    return {f"{name} {field}".strip(): parts[name][field] for name, field in names}


def clear(root: Path) -> None:
    """Takes away the claims, and what was half written, of a run that was killed."""
    for left in [*root.rglob("*.claim"), *root.rglob(".*.tmp-*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def close(place: Path, counts: JsonRow, seconds: float) -> JsonRow:
    files = {path.name: digest(path) for path in sorted(place.glob("*.jsonl"))}
    shutil.rmtree(place / "shards", ignore_errors=True)
    write_json(place / "done.json", {"counts": counts, "seconds": seconds, "files": files})
    return read_json(place / "done.json")


def claim(shard: Path) -> bool:
    """Whether this rank may do a shard; the file system gives it to one alone, whatever host asks."""
    shard.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        shard.with_suffix(".claim").touch(exist_ok=False)
        return True
    return False


def join(shards: Sequence[Path], whole: Path) -> Path:
    with publish_file(whole) as temporary, temporary.open("wb") as joined:
        for path in shards:
            with path.open("rb") as part:
                shutil.copyfileobj(part, joined)
    return whole


def read_rows(path: Path) -> Iterator[JsonRow]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class Run:
    """The steps of the loop, over files. Paths go in, the path of what was written comes out."""

    def __init__(
        self, books: Books, settings: SelfTrainSettings, trains: dict[str, TrainSettings], rules: dict
    ):
        """`trains`: the settings of each kind of training. `rules`: a world's rationale filters, by name."""
        self.books, self.ranks, self.settings, self.trains = books, books.ranks, settings, trains
        self.coherence_rules = denoise.COHERENCE | rules
        self.rationale_rules = denoise.RATIONALE_FILTERS | rules

    def load(self, kind: type, directory: Path) -> Any:
        """A model to sample from, whole on this rank's device."""
        settings, device = self.trains["reward"], self.ranks.device
        gc.collect()  # FSDP holds its modules in circles: one trained before may still be there
        with contextlib.redirect_stderr(sys.stderr if self.ranks.is_first else io.StringIO()):
            return kind.load(directory, device, parallel.compute_dtype(settings, device), date=settings.date)

    def in_shards(self, place: Path, items: Sequence[Any], work: Callable[[list[Any]], Iterable[JsonRow]]):
        """Maps `work` over shards of `items`, each published whole by whoever took it; → their paths."""
        starts = range(0, len(items), PAIRS_PER_CALL)
        paths = [place / "shards" / f"{start:09}.jsonl" for start in starts]

        def take() -> None:
            shown = {"desc": place.name, "unit": "pair", "disable": not self.ranks.is_first, "leave": False}
            with tqdm(total=len(items), mininterval=0.2 if sys.stderr.isatty() else 10, **shown) as bar:
                for start, path in zip(starts, paths, strict=True):
                    end = min(start + PAIRS_PER_CALL, len(items))
                    # The claim comes first: a name that was never looked up is not remembered as absent.
                    if claim(path) and not path.is_file():
                        write_rows(path, work([items[i] for i in range(start, end)]))
                    bar.update(end - start)

        self.ranks.on_all_ranks(take)
        return paths

    def each(self, name: str, source: Path, work: Callable, end: Callable, limit: int = 0) -> JsonRow:
        """A step that maps `work` over shards of a file; `end` makes files of what they left, and counts."""

        def whole(place: Path) -> JsonRow:
            store = Store(source)
            rows = store if not limit else [store[i] for i in range(min(limit, len(store)))]
            shards = self.in_shards(place, rows, work)
            return self.ranks.on_rank_0(lambda: end(shards, place))

        return self.books.step(name, whole)

    def train(self, name: str, kind: str, data: Sequence[Path], start: Path, longer: float = 1) -> Path:
        """Trains from `start`, `longer` times as long as the kind's settings say; → the model directory."""
        config = self.trains[kind]
        steps, epochs = round(config.steps * longer), config.epochs * longer
        config = dataclasses.replace(config, steps=steps, epochs=epochs)
        stage = "reward" if kind == "finetune" else kind
        self.books.step(name, lambda place: fit.train(stage, config, data, start, place))
        return self.books.place(name) / "model"

    @property
    def proving(self) -> dict[str, Any]:
        """How proofs are sampled."""
        s = self.settings
        names = {"temperature": s.proof_temperature, "max_new_tokens": s.proof_tokens}
        return {"seed": s.seed, **names, "select_by": s.select_by, "progress": False}

    def prove(self, name: str, prover: Path, pairs: Path) -> Path:
        """k proofs for each labelled pair; the best by equation (5), or `select_by`, gives the rationale.

        Rows of pair, chosen, rationale, ineligible and, of a few pairs of each shard, all candidates.
        """
        loaded = cache(lambda: self.load(Prover, prover))

        def prove(rows: list[JsonRow]) -> Iterator[JsonRow]:
            known = [Pair.from_json(row) for row in rows]
            proved = loaded().prove_many(known, self.settings.k, **self.proving)
            for number, (pair, proofs) in enumerate(proved):
                chosen = select(proofs)
                row = {"pair": pair.to_json(), "chosen": chosen and chosen.to_json()}
                row["rationale"] = chosen and rationale_of(chosen, loaded().thinking_open)
                failed = (proof.ineligible for proof in proofs if proof.ineligible)
                row["ineligible"] = Counter(failed if proofs else ["too long to prove"])
                if self.settings.keep_candidates or number < SHOWN:
                    row["candidates"] = [proof.to_json() for proof in proofs]
                yield row

        self.each(name, pairs, prove, self._count_proofs)
        return self.books.place(name) / "proofs.jsonl"

    def _count_proofs(self, shards: Sequence[Path], place: Path) -> JsonRow:
        counts, ineligible = Counter(pairs=0, proved=0), Counter()
        for row in read_rows(join(shards, place / "proofs.jsonl")):
            counts.update(pairs=1, proved=bool(row["chosen"]))
            ineligible.update(row["ineligible"])
        if not counts["proved"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in ineligible.most_common())
            raise NothingKept(
                f"{place.name}: no eligible proof of {counts['pairs']} pairs ({reasons}); train it "
                "longer ([train.prover] in the recipe), or give it room (--proof-tokens), in a new run"
            )
        return {**counts, "ineligible": dict(ineligible)}

    def wrong_labels(self, name: str, prover: Path, pairs: Path) -> None:
        """Wrong-label coherence: how many proofs of held-out pairs' wrong labels pass every rule.

        A prover that is told a wrong label and argues for it as well as for the right one hides the judge's
        mistakes from the rules.
        """

        objection = partial(denoise.objection, rules=self.rationale_rules, settings=self.settings)

        def work(place: Path) -> JsonRow:
            held_out = Store(pairs, Pair.from_json)
            return label_coherence(self.load(Prover, prover), held_out, objection, **self.proving)

        counts = self.books.step(name, lambda place: self.ranks.on_rank_0(lambda: work(place)))
        right, wrong = (counts[key]["passed"] / max(1, counts[key]["asked"]) for key in ("right", "wrong"))
        self.books.say(
            f"proofs that pass every rule: {right:.0%} for the right label, {wrong:.0%} for the wrong one"
        )
        if wrong > DECEPTIVE * right:
            self.books.say(
                "warning: it argues for wrong labels too: the rules on rationales will let most wrong "
                "pseudo-labels through, and only the votes stand against them; [train.prover] hide_label in "
                "the recipe may help"
            )

    def judge(self, name: str, model: Path, pairs: Path, votes: int, limit: int = 0) -> Path:
        """Votes on each pair; a row has the pair with its judgment, or with an error."""
        loaded = cache(lambda: self.load(RewardModel, model))
        sampling = {"max_new_tokens": self.settings.judge_tokens, "progress": False}

        def judge(rows: list[JsonRow]) -> Iterator[JsonRow]:
            known = [Pair.from_json(row) for row in rows]
            bare = [dataclasses.replace(pair, label=None, rationale=None) for pair in known]
            judged = loaded().judge_many(bare, votes, self.settings.seed, **sampling)
            for pair, (_, judgment) in zip(known, judged, strict=True):
                failed = isinstance(judgment, InputError)
                row = {"error": str(judgment)} if failed else judgment.to_json()
                yield {"id": pair.id, **row, "pair": pair.to_json()}

        def count(shards: Sequence[Path], place: Path) -> JsonRow:
            rows = read_rows(join(shards, place / "judged.jsonl"))
            labels = Counter(str(row.get("label", "failed")) for row in rows)
            return {"judged": sum(labels.values()), "labels": dict(labels)}

        self.each(name, pairs, judge, count, limit)
        return self.books.place(name) / "judged.jsonl"

    def filter_labels(self, name: str, judged: Path, number: int) -> Path:
        """Pairs whose votes can be trusted, with the label that these give; every drop with its reason."""
        settings = self.settings.for_round(number)

        def sift(rows: list[JsonRow]) -> Iterator[JsonRow]:
            for row in rows:
                pair = Pair.from_json(row["pair"])
                if "error" in row:
                    yield sifted(pair, f"not judged: {row['error']}", {}, {})
                    continue
                judgment = denoise.only_coherent(pair, Judgment.from_row(row), self.coherence_rules, settings)
                sieve = denoise.apply(denoise.LABEL_FILTERS, [(judgment,)], settings)
                pair = dataclasses.replace(pair, label=judgment.label, rationale=None)
                # Without a label there is nothing to prove, whatever filters are switched off.
                reason = sieve.reasons[0] or (None if judgment.label else "no label: no side has more votes")
                yield sifted(pair, reason, sieve.alone, {"votes": judgment.votes, "p_a": judgment.p_a})

        return self._sieve(name, judged, sift)

    def filter_rationales(self, name: str, proofs: Path) -> Path:
        """Pairs whose chosen rationale passes every rule, ready to train on."""

        def sift(rows: list[JsonRow]) -> Iterator[JsonRow]:
            for row in rows:
                pair = Pair.from_json(row["pair"])
                if not row["rationale"]:
                    failed = ", ".join(f"{count} {reason}" for reason, count in row["ineligible"].items())
                    yield sifted(pair, f"no eligible proof: {failed}", {}, {})
                    continue
                sieve = denoise.apply(self.rationale_rules, [(pair, row["rationale"])], self.settings)
                pair = dataclasses.replace(pair, rationale=row["rationale"])
                score = row["chosen"] and row["chosen"]["score"]
                yield sifted(pair, sieve.reasons[0], sieve.alone, {"score": score})

        return self._sieve(name, proofs, sift)

    def _sieve(self, name: str, source: Path, sift: Callable) -> Path:
        """Sifts a file's rows in shards, and parts them: the kept are balanced, drops are written down."""

        def part(shards: Sequence[Path], place: Path) -> JsonRow:
            counts, dropped, alone = Counter({"in": 0, "kept": 0}), Counter(), Counter()

            def kept() -> Iterator[Pair]:
                for row in (row for path in shards for row in read_rows(path)):
                    counts.update({"in": 1, "kept": row["reason"] is None})
                    alone.update(row["alone"])
                    if row["reason"] is None:
                        yield Pair.from_json(row["pair"])

            def lost() -> Iterator[JsonRow]:
                for row in (row for path in shards for row in read_rows(path) if row["reason"]):
                    dropped[row["reason"].partition(":")[0]] += 1
                    label = row["pair"].get("label")
                    yield {"id": row["pair"]["id"], "reason": row["reason"], "label": label, **row["figures"]}

            write_rows(place / "kept.jsonl", (pair.to_json() for pair in denoise.balance(kept())))
            write_rows(place / "dropped.jsonl", lost())
            return {**counts, "dropped": dict(dropped), "alone": dict(alone)}

        counts = self.each(name, source, sift, part)
        if not counts["kept"]:
            most = max(counts["dropped"].items(), key=lambda item: item[1], default=("nothing came in", 0))
            raise NothingKept(
                f"{name}: none of {counts['in']} pairs was kept; most were dropped by {most[0]} ({most[1]}); "
                "the model before is the last. Loosen that filter, or switch it off (--without), in a new run"
            )
        return self.books.place(name) / "kept.jsonl"


def sifted(pair: Pair, reason: str | None, alone: dict[str, int], figures: JsonRow) -> JsonRow:
    """A pair that went through the filters: the reason that dropped it (None: kept), and who objected."""
    return {"pair": pair.to_json(), "reason": reason, "alone": alone, "figures": figures}
