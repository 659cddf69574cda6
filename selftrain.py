"""The whole algorithm of GRAM-R² (arXiv 2509.02492, figure 2): a reward model that teaches itself to reason.

    python selftrain.py --iters 3                  the toy world, from nothing, on a laptop
    python selftrain.py --recipe recipes/micro.toml     the same in half a minute, for a look at every file
    python selftrain.py --recipe R.toml --human H.jsonl --labelled L.jsonl --unlabelled U.jsonl --test T.jsonl

The run is the directory runs/NAME: plan.json, steps/, results.json, report.html. The same command goes on
after an interruption, and does nothing twice. Exit status: 0 done, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from gramr2.files import InputError, Parser, disk_errors_as_input_errors, exit_status, write_json
from gramr2.recipes import read_recipe, resolve
from gramr2.settings import SelfTrainSettings, Sources, TrainSettings, add_flags, given

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class World:
    """What a run starts from: four sets of pairs, one of them held out, and two models."""

    human: Path
    labelled: Path
    unlabelled: list[Path]  # one batch for each round
    test: Path
    held_out: Path  # some of the labelled pairs, none of which trains the prover
    backbone: Path
    prover_base: Path


def self_train(run, world: World, table: Table) -> None:
    """Figure 2, from top to bottom."""
    settings = run.settings
    human = [world.human] if settings.mix_human else []
    table.judge("backbone", world.backbone)

    # 1. A preference-proving model learns to justify a given label (equation 4).
    prover = run.train("prover", "prover", [world.human], world.prover_base)
    run.wrong_labels("wrong-labels", prover, world.held_out)

    # 2. It writes k proofs for each labelled pair; the best by equation 5 becomes the rationale.
    proofs = run.prove("prove-labelled", prover, world.labelled)
    synthesized = [*human, run.filter_rationales("filter-labelled", proofs)]

    # 3. The first reward model is trained on rationale and label (equation 2).
    judge = run.train("initial", "reward", synthesized, world.backbone)
    table.judge("initial", judge)

    for number, batch in enumerate(world.unlabelled, 1):
        # 4. The reward model labels unlabelled pairs by votes; labels it is not sure of are filtered out.
        judged = run.judge(f"round-{number}-predict", judge, batch, settings.votes)
        labelled = run.filter_labels(f"round-{number}-labels", judged, number)
        # 5. The prover writes the rationales, and unreliable ones are filtered out.
        proofs = run.prove(f"round-{number}-prove", prover, labelled)
        synthesized.append(run.filter_rationales(f"round-{number}-rationales", proofs))
        # 6. All synthesized data together train the reward model again, from the backbone.
        judge = run.train(f"round-{number}-train", "reward", synthesized, world.backbone)
        table.judge(f"round {number}", judge)

    # 7. Last comes a fine-tuning on the human rationales.
    final = run.train("fine-tune", "finetune", [world.human], judge)
    table.judge("fine-tuned", final)
    table.judge(f"voting@{settings.test_votes}", final, settings.test_votes)


def baselines(run, world: World, table: Table) -> None:
    """The models that the paper compares with, on the same pairs, and the same data trained for longer."""
    for stage in ("discriminative", "generative"):
        model = run.train(stage, stage, [world.labelled], world.backbone)
        table.judge(stage, model, baseline=True)
    kept = run.books.place("filter-labelled") / "kept.jsonl"
    human = [world.human] if run.settings.mix_human else []
    longer = run.train("labelled-2x", "reward", [*human, kept], world.backbone, longer=2)
    table.judge("labelled only, 2x steps", longer, baseline=True)


# ---------------------------------------------------------------------------------- what a person sees

STAGES_OF_A_ROUND = ("judged", "agreed", "confident", "wellformed", "kept")


class Table:
    """What results.json will say, gathered as the run goes. It and the report alone open the hidden truth."""

    ORDER = ("backbone", "discriminative", "generative", "initial", "round", "labelled", "fine", "voting")

    def __init__(self, run, world: World):
        self.run, self.world, self.model = run, world, world.backbone
        self.rows: list[dict[str, Any]] = []

    def judge(self, name: str, model: Path, votes: int = 1, baseline: bool = False) -> None:
        """A model's accuracy on the held-out pairs; a single vote is greedy and in the given order."""
        from gramr2.extras.evaluate import accuracy_row
        from gramr2.steps import read_rows

        step = "test-" + name.replace(" ", "-").replace(",", "")
        judged = self.run.judge(step, model, self.world.test, votes, self.run.settings.test_limit)
        row = self.run.ranks.on_rank_0(lambda: accuracy_row(name, read_rows(judged)))
        self.rows.append(row)
        self.model = self.model if baseline else model

    def results(self, stopped: str = "") -> dict[str, Any]:
        """What there is so far, also of a run that could not go on."""

        books, numbers = self.run.books, range(1, len(self.world.unlabelled) + 1)
        return {
            "seed": self.run.settings.seed,
            "model": os.path.relpath(self.model, books.root),
            "seconds": books.seconds,
            "data": books.counts["data"],
            "rows": sorted(self.rows, key=lambda row: self.ORDER.index(re.split(r"\W", row["name"])[0])),
            "prover": books.counts.get("wrong-labels"),
            "rounds": [self.round(number) for number in numbers if f"round-{number}-labels" in books.counts],
            "stopped": stopped,
            "next": f"python infer.py --pair {books.root / 'pair.json'}",
        }

    def round(self, number: int) -> dict[str, Any]:
        """A round's funnel: pairs at every stage, and where the truth is known how many labels are right."""
        from gramr2.extras import report

        run, counts = report.Run(self.run.books.root), self.run.books.counts
        truth = {row["id"]: row["label"] for row in run.rows("world", "truth.jsonl")}
        pairs = report.read_round(run, number, truth)
        left, right = {}, {}
        for place, stage in enumerate(STAGES_OF_A_ROUND, 1):
            hits = [pair.right for pair in pairs if pair.reached >= place]
            known = [hit for hit in hits if hit is not None]
            left[stage] = len(hits)
            right[stage] = round(100 * fmean(known), 2) if known else None
        steps = [counts.get(f"round-{number}-{step}", {}) for step in ("labels", "rationales")]
        left["judged"] = steps[0]["in"]  # with those that could not be
        for name in ("dropped", "alone"):
            left[name] = {filter: n for step in steps for filter, n in step.get(name, {}).items()}
        before, after = right["judged"], right["kept"]
        return {
            **left,
            "label_accuracy_before": before,
            "label_accuracy_after": after,
            "label_accuracy": right,
        }


def show(results: dict[str, Any], root: Path) -> None:
    """The end of a run, as a person reads it."""
    names = sorted({name for row in results["rows"] for name in row["by_domain"]})
    domains = names if 1 < len(names) <= 6 else []
    print(f"{'accuracy, %':26}        95% interval   pairs" + "".join(f"  {name:>10}" for name in domains))
    for row in results["rows"]:
        cells = "".join(f"  {row['by_domain'].get(x, math.nan):{max(10, len(x))}.1f}" for x in domains)
        span = f"{row['low']:5.1f} – {row['high']:5.1f}"
        print(f"{row['name']:26}{row['accuracy']:6.1f}  {span} {row['n']:7}{cells}")
    for number, each in enumerate(results["rounds"], 1):
        right = ["" if hit is None else f"{hit:.1f}" for hit in each["label_accuracy"].values()]
        lines = {"pairs": [each[stage] for stage in STAGES_OF_A_ROUND], "labels right, %": right}
        print()
        for head, cells in {f"round {number}": STAGES_OF_A_ROUND, **lines}.items():
            print(f"{head:18}" + "".join(f"{cell:>12}" for cell in cells))
        dropped = ", ".join(f"{name} {n}" for name, n in each["dropped"].items() if n)
        print(f"dropped by {dropped or 'nothing'}")
    if results["prover"]:
        asked = (f"{each['passed']} of {each['asked']} {label}" for label, each in results["prover"].items())
        print(f"\nproofs that pass every rule, by the label asked for: {', '.join(asked)}")
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in results["seconds"].items())
    print("\n" + textwrap.fill(f"seconds: {seconds}", 110, break_on_hyphens=False))
    print(f"model:   {os.path.normpath(root / results['model'])}\nbooks:   {root / 'steps'}")
    print(f"results: {root / 'results.json'}, {root / 'report.html'}\nnext:    {results['next']}")


# ---------------------------------------------------------------------------------- what a run starts from

DATA = ("human", "labelled", "unlabelled", "test")
HELD_OUT = 64  # labelled pairs on which wrong-label coherence is measured


def named_sources(arguments: argparse.Namespace) -> Sources | None:
    """The files and models that the command line and the recipe name; None: the recipe's own toy world."""
    given = {name: getattr(arguments, name) for name in DATA if getattr(arguments, name)}
    is_toy = "world" in read_recipe(arguments.recipe)
    if is_toy and not given:
        return None
    tables = [] if is_toy else ["models", "data"]
    if is_toy:  # pairs of your own beside the toy's recipe keep to the shipped backbone's words
        from gramr2.extras.toyworld import SHIPPED

        given["backbone"] = str(SHIPPED)
    sources = resolve(Sources, arguments.recipe, tables, given)
    missing = ", ".join(f"--{name}" for name in DATA if not getattr(sources, name))
    if missing or not sources.backbone:
        raise InputError(f"{arguments.recipe}: give {missing or 'a [models] backbone in the recipe'} as well")
    return sources


def toy_world(books, recipe: dict, settings: SelfTrainSettings, trains: dict) -> World:
    """Makes the toy world, and pre-trains its backbone where none is shipped for its shape."""
    from gramr2 import fit
    from gramr2.extras import toyworld

    sizes = {name: value for name, value in recipe["world"].items() if name != "directory"}
    sizes["seed"] = settings.seed

    def make(place: Path) -> dict[str, Any]:
        toyworld.make_world(place, **sizes)
        return sizes

    books.step("world", lambda place: books.ranks.on_rank_0(lambda: make(place)))
    world = books.place("world")
    backbone = world / "backbone" / "model"
    if not (backbone / "config.json").is_file():
        start, text = world / "backbone_init", [world / "pretrain.jsonl"]
        books.step("backbone", lambda place: fit.train("pretrain", trains["pretrain"], text, start, place))
        backbone = books.place("backbone") / "model"
    files = {name: (str(world / f"{name}.jsonl"),) for name in DATA}
    return dealt(books, settings, Sources(str(backbone), **files))


def dealt(books, settings, sources: Sources) -> World:
    """One file of each kind, and the unlabelled pairs dealt into a batch for each round, none of them twice.

    A pair of the test is taken out wherever else it stands. Unlabelled pairs that stand among the human or
    the labelled ones, or came before, are left out.
    """
    from gramr2.prompts import verdict_ids
    from gramr2.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(sources.backbone)
    try:
        verdict_ids(tokenizer.encode)
    except InputError as error:
        raise InputError(f"{sources.backbone}: has {error}; take another backbone") from None
    books.step("data", lambda place: books.ranks.on_rank_0(lambda: deal(place, settings, sources, tokenizer)))
    place = books.place("data")
    batches = [place / f"unlabelled-{number + 1}.jsonl" for number in range(settings.iters)]
    files = {name: place / f"{name}.jsonl" for name in ("human", "labelled", "test", "held_out")}
    prover = Path(sources.prover or sources.backbone)
    return World(**files, unlabelled=batches, backbone=Path(sources.backbone), prover_base=prover)


def deal(place: Path, settings, sources: Sources, tokenizer) -> dict[str, int]:
    """Writes the files of `dealt`, row by row; only ids are held. A pair is known by what it says."""
    from gramr2.data import Store, order
    from gramr2.files import write_rows
    from gramr2.records import Pair

    counts: Counter[str] = Counter()
    met: dict[str, set[str]] = {name: set() for name in ("test", "human", "labelled", "unlabelled")}
    owners: dict[str, str] = {}  # whose an id is: files may number their rows alike

    def fresh(name: str):
        above = met if name == "unlabelled" else ["test"]
        for pair in (pair for file in getattr(sources, name) for pair in checked_pairs(file, tokenizer)):
            content = pair.content_id
            if owners.setdefault(pair.id, content) != content:
                pair = replace(pair, id=content)
            if any(content in met[each] for each in above):
                counts[f"{name}, known already"] += 1
            elif name != "unlabelled" and pair.label is None:
                counts[f"{name}, without a label"] += 1
            else:
                counts[name] += 1
                met[name].add(content)
                yield pair if name != "unlabelled" else replace(pair, label=None, rationale=None, margin=None)

    for name in met:
        write_rows(place / f"{name}.jsonl", (pair.to_json() for pair in fresh(name)))
        if not counts[name]:
            raise InputError(f"{name}: no pair is left to use ({dict(counts)}); give others with --{name}")
    labelled = Store(place / "labelled.jsonl", Pair.from_json)
    unproved = (pair.to_json() for pair in labelled if pair.content_id not in met["human"])
    write_rows(place / "held_out.jsonl", islice(unproved, HELD_OUT))
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
    return dict(counts)


def checked_pairs(file: str, tokenizer):
    """A file's pairs. Where a tokenizer has but certain words, a pair with another one is refused."""
    from gramr2 import records
    from gramr2.data import Store

    for number, pair in enumerate(Store(file, records.Pair.from_json), 1):
        texts = [*(text for _, text in pair.messages), pair.response_a, pair.response_b]
        try:
            "".join((*texts, pair.rationale or "")).encode()
        except UnicodeEncodeError:
            raise InputError(f"{file}: row {number}: text that is not Unicode (half a character)") from None
        for text in (f" {text}" for text in texts if tokenizer.unknown_id is not None):
            if tokenizer.unknown_id in tokenizer.encode(text):
                pieces = re.findall(r" ?\w+|[^\w\s]", text)
                word = next((each for each in pieces if tokenizer.unknown_id in tokenizer.encode(each)), text)
                raise InputError(
                    f"{file}: row {number}: the backbone has no word for {word.strip()!r}; use its words"
                )
        yield pair


# ---------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("selftrain.py", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=HERE / "recipes/toy.toml", help="settings [toy]")
    for name in DATA:
        words = {"nargs": "+", "action": "extend", "metavar": "FILE"}
        parser.add_argument(f"--{name}", **words, help="pair files [the recipe's, or the toy's]")
    parser.add_argument("--name", help="the run is the directory runs/NAME [the recipe's name]")
    parser.add_argument("--from", dest="start", metavar="STEP", help="do this step, and all after it, again")
    parser.add_argument("--until", metavar="STEP", help="stop once this step is done")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, and do nothing")
    add_flags(parser, SelfTrainSettings)
    return parser.parse_args(argv)


def resolved(recipe: Path, given: dict[str, Any]) -> tuple[SelfTrainSettings, dict]:
    """The settings of the loop, and those of each kind of training, which share its seed."""
    settings = resolve(SelfTrainSettings, recipe, ["selftrain"], given)
    kind, seed = TrainSettings, {"seed": settings.seed}
    return settings, {k: resolve(kind, recipe, ["train", *over], seed) for k, over in STAGES.items()}


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    settings, trains = resolved(arguments.recipe, given(SelfTrainSettings, arguments))
    sources, recipe = named_sources(arguments), read_recipe(arguments.recipe)
    plan = {"recipe": arguments.recipe.stem, **asdict(settings)}
    plan |= {"from": asdict(sources)} if sources else {"world": recipe["world"]}
    plan["coherence"] = "the shop's" if "world" in recipe else "of plain text"
    plan |= {f"train {stage}": asdict(each) for stage, each in trains.items()}
    root = Path("runs") / (arguments.name or arguments.recipe.stem)
    if arguments.dry_run:
        print(json.dumps({"run": str(root), **plan}, indent=2))
        return 0
    files = [Path(file) for name in DATA for file in getattr(sources, name, ())]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")

    from gramr2 import parallel  # torch takes its seconds only for a run
    from gramr2.extras.toyworld import world_rules
    from gramr2.steps import Books, Run, StoppedAsAsked

    with parallel.join_ranks(trains["reward"]) as ranks:
        books = Books(root, plan, files, ranks, arguments.until)
        if arguments.start:
            ranks.on_rank_0(lambda: books.forget(arguments.start))
        run = Run(books, settings, trains, world_rules(plan))
        try:
            world = dealt(books, settings, sources) if sources else toy_world(books, recipe, settings, trains)
            go(run, world)
        except StoppedAsAsked as reached:
            books.say(f"stopped after {reached}, as asked")
        else:
            if arguments.until:
                raise InputError(
                    f"--until: no step {arguments.until}; all is done: {', '.join(books.counts)}"
                )
    return 0


def go(run, world: World) -> None:
    """The loop and its baselines. Where the loop cannot go on, what it reached is written down and shown."""
    from gramr2.steps import NothingKept

    table, stopped = Table(run, world), None
    try:
        self_train(run, world, table)
        if run.settings.baselines:
            baselines(run, world, table)
    except NothingKept as reason:
        stopped = reason
    run.ranks.on_rank_0(lambda: finish(run.books.root, table.results(str(stopped or "")), world))
    if stopped:
        raise stopped


def finish(root: Path, results: dict[str, Any], world: World) -> None:
    from gramr2.extras.report import write_report
    from gramr2.steps import read_rows

    with disk_errors_as_input_errors(root):
        write_json(root / "pair.json", next(read_rows(world.test)))
        write_json(root / "results.json", results)
        write_report(root)
    show(results, root)


# Each kind of training, and the recipe's tables that lie over [train].
STAGES = {
    "prover": ["train.prover"],
    "reward": ["train.reward"],
    "finetune": ["train.reward", "train.finetune"],
    "generative": ["train.generative"],
    "discriminative": ["train.discriminative"],
    "pretrain": ["train.pretrain"],
}

if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
