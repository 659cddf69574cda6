"""The books of a run, and the steps that are written into them.

A run is a directory. `plan.json` says what it was begun with: settings, hashes of the inputs and of the
code. Each step writes into `steps/NN-name/` and closes it with `done.json` (counts, seconds, hashes of what
it left). A step that is closed is never done again; one that is not goes on from its finished shards. The
same command after a kill therefore goes on, and ends with the same results; other settings under the same
name are refused, field by field.

`Run` has the steps of the paper's loop, each from files to files: train, prove, judge, and the two filters.
Work that samples is cut into fixed shards. A shard is published whole, so a cut one is done again whole, and
the same seed gives the same rows.

It leaves out: the order of the steps (selftrain.py), and everything about the truth: no step here is given a
label that the run did not start with or make itself (extras/evaluate.py compares afterwards).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gramr2 import denoise, fit
from gramr2.config import SelfTrainConfig, TrainConfig
from gramr2.data import Store
from gramr2.files import InputError, digest, publish_file, read_json, write_json, write_rows
from gramr2.judge import SHARD, RewardModel
from gramr2.prover import Prover, rationale_of, select
from gramr2.records import Judgment, Pair


def code_version() -> str:
    """A hash of the package's own sources: a run that other code continues says so."""
    hasher = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


class Reached(Exception):
    """The step after which a run was asked to stop is done."""


class Books:
    """A run's directory, its plan and its steps. `until` names the step after which to stop."""

    def __init__(
        self,
        root: Path,
        settings: dict[str, Any],
        inputs: Iterable[Path],
        say: Callable[[str], None],
        until: str | None = None,
    ):
        self.root, self.say, self.until, self.seconds = Path(root), say, until, {}
        plan = {
            "settings": settings,
            "inputs": {str(path): digest(path) for path in inputs},
            "code": code_version(),
        }
        self._numbers: dict[str, int] = {}
        written = self.root / "plan.json"
        if written.is_file():
            self._check(read_json(written), plan)
        else:
            write_json(written, plan)

    def _check(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Settings and inputs must be what they were. Other code is allowed, and said."""
        changed = [
            f"{name} ({before[part].get(name)!r}, now {now[part].get(name)!r})"
            for part in ("settings", "inputs")
            for name in {**before[part], **now[part]}
            if json.dumps(before[part].get(name)) != json.dumps(now[part].get(name))
        ]
        if changed:
            raise InputError(
                f"{self.root}: was begun with other settings: {', '.join(changed)}; "
                "use them again, or give another --name"
            )
        if before["code"] != now["code"]:
            self.say(f"warning: {self.root} was begun by another version of the code")

    def place(self, name: str) -> Path:
        """steps/NN-name, numbered in the order in which steps are first asked for."""
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        return self.root / "steps" / f"{number:02}-{name}"

    def step(self, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Does a step unless it is done; `work` gets the step's directory and returns its counts."""
        place = self.place(name)
        done = place / "done.json"
        if not done.is_file():
            self.say(f"{place.name} …")
            place.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            counts = work(place)
            files = {path.name: digest(path) for path in sorted(place.glob("*.jsonl"))}
            shutil.rmtree(place / "shards", ignore_errors=True)
            write_json(done, {"counts": counts, "seconds": time.perf_counter() - started, "files": files})
        record = read_json(done)
        self.seconds[name] = round(record["seconds"], 3)
        if name == self.until:
            raise Reached(place)
        return record["counts"]

    def forget(self, name: str) -> None:
        """Removes a step and all that came after it, so that they are done again."""
        places = sorted((self.root / "steps").glob("[0-9][0-9]-*"))
        found = next((i for i, place in enumerate(places) if place.name[3:] == name), None)
        if found is None:
            steps = ", ".join(place.name[3:] for place in places) or "none yet"
            raise InputError(f"--from: no step {name} in {self.root}; there are {steps}")
        for place in reversed(places[found:]):
            shutil.rmtree(place)


def in_shards(
    place: Path, items: Sequence[Any], size: int, work: Callable[[list[Any]], Iterable[dict]], out: str
) -> Path:
    """Maps `work` over shards of `items`, each published whole, and joins them to one JSONL file."""
    paths = []
    for start in range(0, len(items), size):
        path = place / "shards" / f"{out}-{start:09}.jsonl"
        paths.append(path)
        if not path.is_file():
            write_rows(path, work([items[i] for i in range(start, min(start + size, len(items)))]))
    whole = place / out
    with publish_file(whole) as temporary, temporary.open("wb") as joined:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, joined)
    return whole


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class Run:
    """The steps of the loop, over files. Paths go in, the path of what was written comes out."""

    def __init__(self, books: Books, settings: SelfTrainConfig, trains: dict[str, TrainConfig], rules: dict):
        """`trains`: the settings of each kind of training. `rules`: a world's rationale filters, by name."""
        self.books, self.settings, self.trains, self.rules = books, settings, trains, rules

    def train(self, name: str, kind: str, data: Sequence[Path], start: Path, longer: int = 1) -> Path:
        """Trains from `start`, `longer` times as long as the kind's settings say; → the model directory."""
        config = self.trains[kind]
        config = dataclasses.replace(config, steps=config.steps * longer, epochs=config.epochs * longer)
        stage = "reward" if kind == "finetune" else kind
        self.books.step(name, lambda place: fit.train(stage, config, data, start, place))
        return self.books.place(name) / "model"

    def prove(self, name: str, prover: Path, pairs: Path) -> Path:
        """k proofs for each labelled pair; equation (5) picks one; rows of {"pair", "chosen", "reasons"}."""
        out = "proofs.jsonl"

        def work(place: Path) -> dict[str, Any]:
            model = Prover.load(prover)
            settings = self.settings

            def shard(rows: list[Pair]) -> Iterator[dict[str, Any]]:
                proved = model.prove_many(
                    rows,
                    settings.k,
                    settings.seed,
                    temperature=settings.proof_temperature,
                    max_new_tokens=settings.proof_tokens,
                )
                for pair, proofs in proved:
                    chosen = select(proofs)
                    row = {"pair": pair.to_json(), "chosen": chosen and chosen.to_json()}
                    row["rationale"] = chosen and rationale_of(chosen, model.opened)
                    row["ineligible"] = Counter(proof.ineligible for proof in proofs if proof.ineligible)
                    if settings.keep_candidates:
                        row["candidates"] = [proof.to_json() for proof in proofs]
                    yield row

            rows = read_rows(in_shards(place, Store(pairs, Pair.from_json), SHARD, shard, out))
            return {"pairs": 0, "proved": 0} | Counter(
                key for row in rows for key in ("pairs", *(["proved"] if row["chosen"] else []))
            )

        self.books.step(name, work)
        return self.books.place(name) / out

    def judge(self, name: str, model: Path, pairs: Path, votes: int, limit: int = 0) -> Path:
        """Votes on each pair; rows of a judgment with its pair, or with an error."""
        out = "judged.jsonl"

        def work(place: Path) -> dict[str, Any]:
            judge, store = RewardModel.load(model), Store(pairs, Pair.from_json)
            items = store if not limit else [store[i] for i in range(min(limit, len(store)))]

            def shard(rows: list[Pair]) -> Iterator[dict[str, Any]]:
                unlabelled = [dataclasses.replace(pair, label=None, rationale=None) for pair in rows]
                judged = judge.judge_many(
                    unlabelled, votes, self.settings.seed, max_new_tokens=self.settings.judge_tokens
                )
                for pair, (_, judgment) in zip(rows, judged, strict=True):
                    failed = isinstance(judgment, InputError)
                    row = {"error": str(judgment)} if failed else judgment.to_json()
                    yield {"id": pair.id, **row, "pair": pair.to_json()}

            rows = read_rows(in_shards(place, items, SHARD, shard, out))
            labels = Counter(str(row.get("label", "failed")) for row in rows)
            return {"judged": sum(labels.values()), "labels": dict(labels)}

        self.books.step(name, work)
        return self.books.place(name) / out

    def filter_labels(self, name: str, judged: Path) -> tuple[Path, dict[str, Any]]:
        """Pairs whose votes can be trusted, with the label that these give; every drop with its reason."""

        def work(place: Path) -> dict[str, Any]:
            rows = [row for row in read_rows(judged) if "error" not in row]
            pairs = [Pair.from_json(row["pair"]) for row in rows]
            judgments = [
                denoise.only_coherent(pair, judgment_of(row), self.rules, self.settings)
                for pair, row in zip(pairs, rows, strict=True)
            ]
            sieve = denoise.apply(denoise.LABEL_FILTERS, [(each,) for each in judgments], self.settings)
            kept = [
                dataclasses.replace(pair, label=judgment.label, rationale=None)
                for pair, judgment, reason in zip(pairs, judgments, sieve.reasons, strict=True)
                if reason is None
            ]
            self._write_sieve(place, sieve, [row["id"] for row in rows], denoise.balance(kept))
            return {"in": len(rows), "kept": len(kept), "dropped": sieve.dropped, "alone": sieve.alone}

        return self.books.place(name) / "kept.jsonl", self.books.step(name, work)

    def filter_rationales(self, name: str, proofs: Path) -> tuple[Path, dict[str, Any]]:
        """Pairs whose chosen rationale passes every rule, ready to train on."""

        def work(place: Path) -> dict[str, Any]:
            rows = list(read_rows(proofs))
            pairs = [Pair.from_json(row["pair"]) for row in rows]
            proved = [i for i, row in enumerate(rows) if row["rationale"]]
            items = [(pairs[i], rows[i]["rationale"]) for i in proved]
            sieve = denoise.apply(denoise.RATIONALE_FILTERS | self.rules, items, self.settings)
            kept = [
                dataclasses.replace(pair, rationale=rationale)
                for (pair, rationale), reason in zip(items, sieve.reasons, strict=True)
                if reason is None
            ]
            self._write_sieve(place, sieve, [pairs[i].id for i in proved], denoise.balance(kept))
            dropped = sieve.dropped | {"no eligible proof": len(rows) - len(proved)}
            return {"in": len(rows), "kept": len(kept), "dropped": dropped, "alone": sieve.alone}

        return self.books.place(name) / "kept.jsonl", self.books.step(name, work)

    def _write_sieve(self, place: Path, sieve: denoise.Sieve, ids: list[str], kept: list[Pair]) -> None:
        write_rows(place / "kept.jsonl", (pair.to_json() for pair in kept))
        dropped = zip(ids, sieve.reasons, strict=True)
        write_rows(place / "dropped.jsonl", ({"id": i, "reason": why} for i, why in dropped if why))


def judgment_of(row: dict[str, Any]) -> Judgment:
    """A row of a judged file as the record that it was written from."""
    return Judgment.from_json({name: value for name, value in row.items() if name not in ("id", "pair")})
