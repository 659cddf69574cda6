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
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gramr2 import config as settings
from gramr2.files import InputError, exit_status, write_json

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class World:
    """What a run starts from: four sets of pairs, one of them held out, and two models."""

    human: Path
    labelled: Path
    unlabelled: list[Path]  # one batch for each round
    test: Path
    backbone: Path
    prover_base: Path
    truth: Path | None = None  # the unlabelled pairs' labels, where a made world knows them: for reporting


def self_train(run, world: World, table: Table) -> Path:
    """Figure 2, from top to bottom."""
    config = run.settings
    human = [world.human] if config.mix_human else []
    table.judge("backbone", world.backbone)

    # 1. A preference-proving model learns to justify a given label (equation 4).
    prover = run.train("prover", "prover", [world.human], world.prover_base)

    # 2. It writes k proofs for each labelled pair; the best by equation 5 becomes the rationale.
    proofs = run.prove("prove-labelled", prover, world.labelled)
    kept, _ = run.filter_rationales("filter-labelled", proofs)
    synthesized = [*human, kept]

    # 3. The first reward model is trained on rationale and label (equation 2).
    judge = run.train("initial", "reward", synthesized, world.backbone)
    table.judge("initial", judge)

    for number, batch in enumerate(world.unlabelled, 1):
        # 4. The reward model labels unlabelled pairs by votes; labels it is not sure of are filtered out.
        judged = run.judge(f"round-{number}-predict", judge, batch, config.votes)
        labelled, labels = run.filter_labels(f"round-{number}-labels", judged)
        # 5. The prover writes the rationales, and unreliable ones are filtered out.
        proofs = run.prove(f"round-{number}-prove", prover, labelled)
        kept, rationales = run.filter_rationales(f"round-{number}-rationales", proofs)
        table.round(judged, labelled, kept, labels, rationales, world.truth)
        # 6. All synthesized data together train the reward model again, from the backbone.
        synthesized.append(kept)
        judge = run.train(f"round-{number}-train", "reward", synthesized, world.backbone)
        table.judge(f"round {number}", judge)

    # 7. Last comes a fine-tuning on the human rationales.
    final = run.train("fine-tune", "finetune", [world.human], judge)
    table.judge("fine-tuned", final)
    table.judge("voting@16", final, config.test_votes)
    return final


def baselines(run, world: World, table: Table) -> None:
    """The models that the paper compares with, on the same pairs, and the same data trained for longer."""
    for stage in ("discriminative", "generative"):
        table.judge(stage, run.train(stage, stage, [world.labelled], world.backbone))
    kept = run.books.place("filter-labelled") / "kept.jsonl"
    human = [world.human] if run.settings.mix_human else []
    longer = run.train("labelled-2x", "reward", [*human, kept], world.backbone, longer=2)
    table.judge("labelled only, 2x steps", longer)


class Table:
    """The rows of results.json, made as the run goes."""

    ORDER = (
        "backbone",
        "discriminative",
        "generative",
        "initial",
        "round",
        "labelled only",
        "fine-tuned",
        "voting",
    )

    def __init__(self, run, test: Path):
        self.run, self.test = run, test
        self.rows: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []

    def judge(self, name: str, model: Path, votes: int = 1) -> None:
        """A model's accuracy on the held-out pairs; a single vote is greedy and in the given order."""
        from gramr2.extras.evaluate import accuracy_row
        from gramr2.steps import read_rows

        step = "test-" + name.replace(" ", "-").replace(",", "")
        judged = self.run.judge(step, model, self.test, votes, self.run.settings.test_limit)
        self.rows.append(accuracy_row(name, read_rows(judged)))

    def round(self, judged: Path, labelled: Path, kept: Path, labels: dict, rationales: dict, truth) -> None:
        """A round's funnel, and how true the labels were before and after the filters."""
        from gramr2.extras.evaluate import label_accuracy
        from gramr2.steps import read_rows

        if not rationales["kept"]:
            most = max((labels["dropped"] | rationales["dropped"]).items(), key=lambda item: item[1])
            raise InputError(
                f"round {len(self.rounds) + 1} kept no pair; most were dropped by {most[0]} ({most[1]}); "
                "the model before it is the last one. Loosen that filter, or switch it off with --without"
            )
        true = {row["id"]: row["label"] for row in read_rows(truth)} if truth else {}
        agreed = labels["in"] - labels["dropped"].get("agreement", 0)
        malformed = ("structure", "length", "no eligible proof")
        self.rounds.append(
            {
                "judged": labels["in"],
                "agreed": agreed,
                "confident": labels["kept"],
                "wellformed": rationales["in"]
                - sum(rationales["dropped"].get(name, 0) for name in malformed),
                "kept": rationales["kept"],
                "dropped": labels["dropped"] | rationales["dropped"],
                "label_accuracy_before": label_accuracy(
                    ((row["id"], row.get("label")) for row in read_rows(judged)), true
                ),
                "label_accuracy_after": label_accuracy(_labels_in_given_order(judged, kept), true),
            }
        )

    def results(self, model: Path) -> dict[str, Any]:
        def place(row: dict[str, Any]) -> int:
            return next(i for i, start in enumerate(self.ORDER) if row["name"].startswith(start))

        books = self.run.books
        return {
            "seed": self.run.settings.seed,
            "model": str(model.relative_to(books.root)),
            "seconds": books.seconds,
            "rows": sorted(self.rows, key=place),
            "rounds": self.rounds,
        }


def _labels_in_given_order(judged: Path, kept: Path):
    """(id, pseudo-label) of the pairs that were kept, as they stood before they were balanced by swaps."""
    from gramr2.steps import read_rows

    chosen = {row["id"] for row in read_rows(kept)}
    return ((row["id"], row.get("label")) for row in read_rows(judged) if row["id"] in chosen)


def print_table(results: dict[str, Any], root: Path) -> None:
    print(f"{'':26}{'accuracy':>9}  95% interval   pairs")
    for row in results["rows"]:
        print(f"{row['name']:26}{row['accuracy']:9.1f}  {row['low']:5.1f} – {row['high']:5.1f} {row['n']:7}")
    for number, each in enumerate(results["rounds"], 1):
        stages = " → ".join(f"{each[name]} {name}" for name in ("judged", "agreed", "confident", "kept"))
        before, after = each["label_accuracy_before"], each["label_accuracy_after"]
        known = f"; labels {before} % right before the filters, {after} % after" if after is not None else ""
        print(f"round {number}: {stages}{known}")
    print(f"model: {root / results['model']}\nreport: {root / 'report.html'}")


# ---------------------------------------------------------------------------------- what a run starts from


def open_world(books, arguments: argparse.Namespace, config: settings.SelfTrainConfig, trains: dict) -> World:
    """The four files and two models: named on the command line, or in the recipe, or its toy world."""
    recipe = settings.read_recipe(arguments.recipe)
    sources = settings.resolve(settings.Sources, arguments.recipe, ["models", "data"], {})
    named = {name: getattr(arguments, name) or getattr(sources, name) for name in DATA}
    if "world" in recipe and not any(getattr(arguments, name) for name in DATA):
        return toy_world(books, recipe, config, trains)
    missing = [f"--{name}" for name in DATA if not named[name]]
    if missing or not sources.backbone:
        raise InputError(
            f"{arguments.recipe}: give {', '.join(missing) or 'a [models] backbone in the recipe'}"
        )
    return prepared(
        books, config, {name: [Path(file) for file in files] for name, files in named.items()},
        Path(sources.backbone), Path(sources.prover or sources.backbone), None,
    )  # fmt: skip


def rules_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The toy world brings a rule of coherence of its own; real text has the general ones."""
    from gramr2.extras import toyworld

    is_toy = "world" in settings.read_recipe(arguments.recipe)
    return {"coherence": toyworld.coherent} if is_toy else {}


def toy_world(books, recipe: dict, config: settings.SelfTrainConfig, trains: dict) -> World:
    """Makes the toy world and pre-trains its backbone, as the first two steps of the run."""
    from gramr2 import fit
    from gramr2.extras import toyworld

    sizes = {name: value for name, value in recipe.get("world", {}).items() if name != "directory"}
    sizes["seed"] = config.seed

    def make(place: Path) -> dict[str, Any]:
        toyworld.make_world(place, **sizes)
        return sizes

    books.step("world", make)
    world = books.place("world")
    start, text = world / "backbone_init", [world / "pretrain.jsonl"]
    books.step("backbone", lambda place: fit.train("pretrain", trains["pretrain"], text, start, place))
    backbone = books.place("backbone") / "model"
    files = {name: [world / f"{name}.jsonl"] for name in DATA}
    return prepared(books, config, files, backbone, backbone, world / "truth.jsonl")


def prepared(books, config, files: dict[str, list[Path]], backbone: Path, prover: Path, truth) -> World:
    """One file of each kind; the unlabelled pairs dealt into a batch for each round, none of them twice.

    An unlabelled pair that also stands in the labelled set, in the human one or in the test is dropped.
    """
    from gramr2.data import Store, order
    from gramr2.steps import write_rows

    def deal(place: Path) -> dict[str, Any]:
        known, counts = set(), {}
        for name in ("human", "labelled", "test"):
            rows = [row for file in files[name] for row in Store(file, _pair)]
            known |= {pair.id for pair in rows}
            write_rows(place / f"{name}.jsonl", (pair.to_json() for pair in rows))
            counts[name] = len(rows)
        stores = [Store(file, _pair) for file in files["unlabelled"]]
        places = [(store, i) for store in stores for i in range(len(store))]
        share = config.pool or len(places) // config.iters
        if share < 1 or share * config.iters > len(places):
            raise InputError(
                f"unlabelled: {len(places)} pairs are too few for {config.iters} rounds of {share}"
            )
        chosen = order(len(places), config.seed, 0)
        counts["unlabelled, known already"] = 0
        for number in range(config.iters):
            batch = [places[i] for i in chosen[number * share : (number + 1) * share]]
            pairs = [pair for pair in (store[i] for store, i in batch) if pair.id not in known]
            counts["unlabelled, known already"] += len(batch) - len(pairs)
            bare = (replace(pair, label=None, rationale=None) for pair in pairs)
            write_rows(place / f"unlabelled-{number + 1}.jsonl", (pair.to_json() for pair in bare))
        return counts

    books.step("data", deal)
    place = books.place("data")
    batches = [place / f"unlabelled-{number + 1}.jsonl" for number in range(config.iters)]
    known = [place / f"{name}.jsonl" for name in ("human", "labelled")]
    return World(*known, batches, place / "test.jsonl", backbone, prover, truth)


def _pair(row: dict[str, Any]):
    from gramr2.records import Pair

    return Pair.from_json(row)


# ---------------------------------------------------------------------------------- the command

DATA = ("human", "labelled", "unlabelled", "test")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "selftrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=HERE / "recipes/toy.toml", help="settings [toy]")
    for name in DATA:
        parser.add_argument(
            f"--{name}", nargs="+", metavar="FILE", help="pair files [the recipe's, or the toy's]"
        )
    parser.add_argument("--name", help="the run is the directory runs/NAME [the recipe's name]")
    parser.add_argument("--from", dest="start", metavar="STEP", help="do this step, and all after it, again")
    parser.add_argument("--until", metavar="STEP", help="stop once this step is done")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, and do nothing")
    settings.add_flags(parser, settings.SelfTrainConfig)
    return parser.parse_args(argv)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    given = settings.given(settings.SelfTrainConfig, arguments)
    config = settings.resolve(settings.SelfTrainConfig, arguments.recipe, ["selftrain"], given)
    trains = {}
    for stage, tables in STAGES.items():
        trains[stage] = settings.resolve(
            settings.TrainConfig, arguments.recipe, ["train", *tables], {"seed": config.seed}
        )
    plan = {"recipe": arguments.recipe.stem, **asdict(config)}
    plan |= {f"train {stage}": asdict(each) for stage, each in trains.items()}
    plan |= {"world": settings.read_recipe(arguments.recipe).get("world")}
    root = Path("runs") / (arguments.name or arguments.recipe.stem)
    if arguments.dry_run:
        print(json.dumps({"run": str(root), **plan}, indent=2))
        return 0

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("selftrain.py runs as one process; under torchrun use train.py for each stage")
    from gramr2.steps import Books, Reached, Run  # torch takes its seconds only for a run

    files = [Path(file) for name in DATA for file in getattr(arguments, name) or ()]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file")
    books = Books(root, json.loads(json.dumps(plan)), files, say, arguments.until)
    if arguments.start:
        books.forget(arguments.start)
    run = Run(books, config, trains, rules_of(arguments))
    try:
        world = open_world(books, arguments, config, trains)
        table = Table(run, world.test)
        model = self_train(run, world, table)
        if config.baselines:
            baselines(run, world, table)
    except Reached as reached:
        say(f"stopped after {reached}, as asked")
        return 0
    finish(root, table.results(model))
    return 0


def finish(root: Path, results: dict[str, Any]) -> None:
    from gramr2.extras.report import write_report

    write_report(root / "report.html", results, f"GRAM-R² self-training: {root.name}")
    write_json(root / "results.json", results)
    print_table(results, root)


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
