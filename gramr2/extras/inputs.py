"""What a self-training run starts from: four sets of pairs that share none with the test, and two models.

`prepare` is the run's step `data`. It writes one file of each kind, deals the unlabelled pairs into a batch
for each round, none of them twice, and puts some labelled pairs by, on which the prover is measured. A pair
of the test is taken out wherever else it stands; unlabelled pairs that stand among the human or the labelled
ones, or came before, are left out. A pair is known by what it says: files may number their rows alike. Their
labels, where a truth.jsonl beside unlabelled pairs tells them, are kept for the report.

It leaves out: where the files come from (selftrain.py; extras/datasets.py makes them from published data).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from gramr2.data import Store, order
from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, publish_rows, read_rows, write_rows
from gramr2.prompts import verdict_ids
from gramr2.records import Pair
from gramr2.run_directory import RunDirectory
from gramr2.settings import SelfTrainSettings, Sources
from gramr2.tokenizer import Tokenizer

KINDS = ("human", "labelled", "unlabelled", "test")
HELD_OUT = 64  # labelled pairs on which wrong-label coherence is measured


@dataclass(frozen=True)
class RunInputs:
    """The files of pairs, one of them held out, and the models that training begins from."""

    human: Path
    labelled: Path
    unlabelled: list[Path]  # one batch for each round
    test: Path
    held_out: Path  # some of the labelled pairs, none of which trains the prover
    backbone: Path
    prover_base: Path


def prepare(directory: RunDirectory, settings: SelfTrainSettings, sources: Sources) -> RunInputs:
    """The step `data`, and what it leaves."""
    tokenizer = Tokenizer.load(sources.backbone)
    try:
        verdict_ids(tokenizer.encode)
    except InputError as error:
        raise InputError(f"{sources.backbone}: has {error}; take another backbone") from None
    with directory.step("data") as step:
        if step.to_do:
            step.close(
                directory.ranks.on_rank_0(lambda: split_pairs(step.path, settings, sources, tokenizer))
            )
    batches = [step.path / f"unlabelled-{number + 1}.jsonl" for number in range(settings.iters)]
    files = {name: step.path / f"{name}.jsonl" for name in ("human", "labelled", "test", "held_out")}
    prover_base = Path(sources.prover or sources.backbone)
    return RunInputs(**files, unlabelled=batches, backbone=Path(sources.backbone), prover_base=prover_base)


def split_pairs(
    place: Path, settings: SelfTrainSettings, sources: Sources, tokenizer: Tokenizer
) -> dict[str, int]:
    """Writes the files of `RunInputs`, row by row; only ids are held. → how many pairs of each kind."""
    counts: Counter[str] = Counter()
    met: dict[str, set[str]] = {name: set() for name in ("test", "human", "labelled", "unlabelled")}
    owners: dict[str, str] = {}  # whose an id is: files may number their rows alike
    truth: list[JsonRow] = []
    for name in met:
        others = met if name == "unlabelled" else ["test"]
        with publish_rows(place / f"{name}.jsonl") as write:
            for pair, known in told_pairs(getattr(sources, name), tokenizer, name == "unlabelled"):
                if counts[name] == (settings.limit or None) and name in ("human", "labelled"):
                    break
                content = pair.content_id
                if owners.setdefault(pair.id, content) != content:
                    pair = replace(pair, id=content)
                if any(content in met[other] for other in others):
                    counts[f"{name}, known already"] += 1
                elif name != "unlabelled" and pair.label is None:
                    counts[f"{name}, without a label"] += 1
                else:
                    counts[name] += 1
                    met[name].add(content)
                    bare = replace(pair, label=None, rationale=None, margin=None)
                    write((bare if name == "unlabelled" else pair).to_json())
                    truth += [{"id": pair.id, "label": known}] if name == "unlabelled" and known else []
        if not counts[name]:
            raise InputError(f"{name}: no pair is left to use ({dict(counts)}); give others with --{name}")
    unproved = (
        pair.to_json()
        for pair in Store(place / "labelled.jsonl", Pair.from_json)
        if pair.content_id not in met["human"]
    )
    write_rows(place / "held_out.jsonl", islice(unproved, HELD_OUT))
    write_rows(place / "truth.jsonl", truth)  # nothing that trains or filters opens it
    deal_rounds(place, settings)
    return dict(counts)


def told_pairs(files: Sequence[str], tokenizer: Tokenizer, told: bool) -> Iterator[tuple[Pair, str | None]]:
    """Every pair of some files; where it may be `told`, with the label that stands beside its file."""
    for file in files:
        truth = truth_beside(Path(file)) if told else {}
        for pair in checked_pairs(file, tokenizer):
            yield pair, truth.get(pair.id)


def truth_beside(file: Path) -> dict[str, str | None]:
    """The labels, by the pairs' ids, that a truth.jsonl beside their file tells; none where there is none."""
    truth, path = {}, file.with_name("truth.jsonl")
    for number, row in enumerate(read_rows(path) if path.is_file() else (), 1):
        fields = Fields(row, f"{path}: row {number}: ")
        of = str(fields.get("id", int if type(fields.row.get("id")) is int else str))
        truth[of] = fields.get("label", str, None, among=("A", "B"))
    return truth


def deal_rounds(place: Path, settings: SelfTrainSettings) -> None:
    """A batch of unlabelled pairs for each round, in a seeded order."""
    pool = Store(place / "unlabelled.jsonl")
    share = settings.pool or len(pool) // settings.iters
    if share < 1 or share * settings.iters > len(pool):
        raise InputError(
            f"unlabelled: {len(pool)} pairs are too few for {settings.iters} rounds of {max(1, share)}; "
            "give more, or fewer rounds (--iters), or smaller ones (--pool)"
        )
    chosen = order(len(pool), settings.seed, 0)
    for number in range(settings.iters):
        batch = chosen[number * share : (number + 1) * share]
        write_rows(place / f"unlabelled-{number + 1}.jsonl", (pool[i] for i in batch))


def checked_pairs(file: str, tokenizer: Tokenizer) -> Iterator[Pair]:
    """A file's pairs. Where a tokenizer has but certain words, a pair with another one is refused."""
    for number, pair in enumerate(Store(file, Pair.from_json), 1):
        texts = [*(text for _, text in pair.messages), pair.response_a, pair.response_b]
        try:
            for text in texts if tokenizer.unknown_id is not None else ():
                tokenizer.encode(f" {text}")  # a word is known by the blank before it
        except InputError as error:
            raise InputError(f"{file}: row {number}: {error}") from None
        yield pair
