"""Every arm of a study, over seeds: what each part of the algorithm buys, beside its controls.

    python benchmarks/study.py --seeds 112-121              the toy; several processes may share the seeds
    python benchmarks/study.py --seeds 112-121 --arms main  the default command's rows alone
    python benchmarks/study.py --seeds 112-121 --collect    no runs: the table of what is there
    python benchmarks/study.py --recipe recipes/convincing.toml --seeds 0-2 --arms main "single models"

`main` is `python selftrain.py --recipe R --seed S`, as a user types it. Every other arm starts from the same
backbone with the same number of optimiser steps and the same schedule, on the same data; what it shares with
`main` (the prover, the proofs, the first judge) is taken from there. Runs lie under
runs/RECIPE-seeds/seed-S/ARM and go on after an interruption. The result is benchmarks/results/RECIPE.json.

Differences are paired: both arms judged the same test pairs. An interval is a bootstrap, 95%, over a seed's
test pairs; that of a mean draws seeds first, then pairs within each.

Left out: tuning. The settings stand in the recipe; README.md lists what was tried, on which seeds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from gramr2 import parallel
from gramr2.commands import selftrain
from gramr2.data import Store
from gramr2.denoise import FILTERS
from gramr2.extras.evaluate import average, is_right
from gramr2.extras.results import Results
from gramr2.extras.toyworld import world_rules
from gramr2.files import read_json, read_rows, write_json, write_rows
from gramr2.records import Pair
from gramr2.run_directory import RunDirectory, StoppedAsAsked, step_paths
from gramr2.settings import SelfTrainSettings, Sources, TrainSettings, check_names
from gramr2.steps import NothingKept, Run

RESAMPLES = 2000

# ---------------------------------------------------------------------------------- what an arm changes


class OwnRationales(Run):
    """Trains on the judge's own rationales: no prover writes any for the unlabelled pairs."""

    def filter_labels(self, name: str, judged: Path, *more) -> Path:
        self.judged = judged
        return super().filter_labels(name, judged, *more)

    def prove(self, name: str, prover: Path, pairs: Path) -> Path:
        if not name.startswith("round"):
            return super().prove(name, prover, pairs)

        with self.directory.step(name) as step:
            if step.to_do:
                judged = {row["id"]: row for row in read_rows(self.judged)}
                rows = [self._own(pair, judged[pair.id]) for pair in Store(pairs, Pair.from_json)]
                write_rows(step.path / "proofs.jsonl", rows)
                step.close({"pairs": len(rows), "proved": sum(bool(row["rationale"]) for row in rows)})
        return step.path / "proofs.jsonl"

    def _own(self, pair: Pair, row: dict[str, Any]) -> dict[str, Any]:
        """The judgment's rationale belongs to the order that the pair was judged in."""
        own = Pair.from_json(row["pair"] | {"label": row["label"], "rationale": row["rationale"]})
        turned = own if own.response_a == pair.response_a else own.swapped()
        bare = replace(turned, rationale=None).to_json()
        return {"pair": bare, "chosen": None, "rationale": turned.rationale, "ineligible": {}}


class ShuffledRationales(Run):
    """Each pair gets the rationale of another one with the same label: the form without the content."""

    def filter_rationales(self, name: str, proofs: Path, *more) -> Path:
        kept = super().filter_rationales(name, proofs, *more)

        with self.directory.step(f"{name}-shuffled") as step:
            if step.to_do:
                pairs = list(Store(kept, Pair.from_json))
                for label in "AB":
                    members = [i for i, pair in enumerate(pairs) if pair.label == label]
                    texts = [pairs[i].rationale for i in members]
                    for i, text in zip(members, texts[1:] + texts[:1], strict=True):
                        pairs[i] = replace(pairs[i], rationale=text)
                write_rows(step.path / "kept.jsonl", (pair.to_json() for pair in pairs))
                step.close({"pairs": len(pairs)})
        return step.path / "kept.jsonl"


class Continued(Run):
    """Each round goes on from the last judge instead of from the backbone."""

    last: Path | None = None

    def train(self, name: str, stage: str, data: Sequence[Path], start: Path, *more) -> Path:
        begin = self.last if stage == "reward" and self.last else start
        model = super().train(name, stage, data, begin, *more)
        self.last = model if stage == "reward" else self.last
        return model


@dataclass(frozen=True)
class Loop:
    """Three rounds with one thing changed; `shares` is the last step that is the same as in `main`."""

    shares: str
    run: type[Run] = Run
    changes: dict[str, Any] | None = None
    until: str = ""  # the test of the last round


LABELS, RULES = FILTERS[:3], FILTERS[3:]
LOOPS = {
    "no denoising": Loop("round-1-predict", changes={"without": FILTERS}),
    "no coherence rule": Loop("round-1-predict", changes={"without": ("coherence", "quotes")}),
    "no label filters": Loop("round-1-predict", changes={"without": LABELS}),
    "no rationale filters": Loop("round-1-predict", changes={"without": tuple(RULES)}),
    "no agreement": Loop("round-1-predict", changes={"without": ("agreement",)}),
    "no confidence": Loop("round-1-predict", changes={"without": ("confidence",)}),
    "random eligible proof": Loop("wrong-labels", changes={"select_by": "random"}),
    "by the numerator alone": Loop("wrong-labels", changes={"select_by": "numerator"}),
    "by the label contrast": Loop("wrong-labels", changes={"select_by": "contrast"}),
    "the judge's own rationales": Loop("round-1-labels", OwnRationales),
    # It ends with the first judge: of what that one says, the first round keeps nothing.
    "shuffled rationales": Loop("prove-labelled", ShuffledRationales, until="test-initial"),
    "continued, not restarted": Loop("round-1-predict", Continued),
}


# ---------------------------------------------------------------------------------- running


@dataclass
class Seed:
    """One world, and the arms that are run on it."""

    number: int
    recipe: Path

    @property
    def place(self) -> Path:
        return Path(f"runs/{self.recipe.stem}-seeds/seed-{self.number}")

    def main(self) -> None:
        words = ["--recipe", str(self.recipe), "--seed", str(self.number), "--name", "main"]
        words += ["--no-side-by-side"]  # other seeds have the other cores
        if selftrain.main(words, self.place):
            raise SystemExit(f"seed {self.number}: the default command failed")

    def settings(self) -> tuple[SelfTrainSettings, dict[str, TrainSettings]]:
        return selftrain.resolved(self.recipe, {"seed": self.number}, self.sources)

    def open(self, arm: str, kind: type[Run], changes: dict[str, Any], until: str | None = None) -> Run:
        settings, trainings = self.settings()
        settings = replace(settings, signals=0, **changes)  # `main` has weighed them
        check_names(settings, selftrain.REGISTRIES)
        plan = {"arm": arm, **asdict(settings)} | {name: asdict(each) for name, each in trainings.items()}
        torch.set_num_threads(trainings["reward"].threads)
        cuda = trainings["reward"].device != "cpu" and torch.cuda.is_available()
        ranks = parallel.Ranks(0, 1, torch.device("cuda" if cuda else "cpu"))
        directory = RunDirectory(self.place / _slug(arm), plan, [], ranks, until)
        print(f"seed {self.number}, {arm}", file=sys.stderr)
        return kind(directory, settings, trainings, world_rules(selftrain.world_plan(self.recipe)))

    def end_of(self, loop: Loop) -> str:
        return loop.until or f"test-round-{self.settings()[0].iters}"

    def loop(self, arm: str, loop: Loop) -> None:
        """The loop of selftrain.py under other settings, with the steps that it shares linked in."""
        run = self.open(arm, loop.run, loop.changes or {}, self.end_of(loop))
        for name, step in step_paths(self.place / "main").items():
            there = run.directory.root / "steps" / step.name
            if not there.exists():
                shutil.copytree(step, there, copy_function=os.link)
            if name == loop.shares:
                break
        try:
            inputs = selftrain.inputs_of(run, self.recipe, self.sources)
            selftrain.self_train(run, inputs, Results(run, inputs))
        except StoppedAsAsked:
            pass
        except NothingKept as reason:
            print(f"seed {self.number}, {arm}: {reason}", file=sys.stderr)

    def singles(self) -> None:
        """Arms of one training each: what true labels would give, and less data than `initial` has."""
        run, main = self.open("single models", Run, {}), self.step
        human, labelled, test = (main("data") / f"{name}.jsonl" for name in ("human", "labelled", "test"))
        truth = {row["id"]: row["label"] for row in read_rows(main("data") / "truth.jsonl")}

        with run.directory.step("true-labels") as step:
            true = step.path / "pairs.jsonl"
            if step.to_do:
                batches = [main("data") / f"unlabelled-{n + 1}.jsonl" for n in range(run.settings.iters)]
                pairs = [pair for batch in batches for pair in Store(batch, Pair.from_json)]
                known = [replace(pair, label=truth[pair.id]) for pair in pairs if truth.get(pair.id)]
                write_rows(true, (pair.to_json() for pair in known))
                step.close({"pairs": len(known)})
        proofs = run.prove("true-prove", main("prover") / "model", true)
        kept = run.filter_rationales("true-rationales", proofs)
        known = main("filter-labelled") / "kept.jsonl"
        for name, stage, data in (
            ("true labels on the pool", "reward", [*self.human, known, kept]),
            ("generative, true labels on the pool", "generative", [labelled, true]),
            ("labelled, without the human rationales", "reward", [known]),
            ("human rationales alone", "reward", [human]),
        ):
            model = run.train(_slug(name), stage, data, self.backbone)
            run.judge(f"test-{_slug(name)}", model, test, 1)

    def lengths(self) -> None:
        """The control at other lengths: is it the number of steps that it lacks, or has too many of?"""
        run, data = self.open("other lengths", Run, {}), self.step("data")
        known = [*self.human, self.step("filter-labelled") / "kept.jsonl"]
        for name, share in LENGTHS.items():
            model = run.train(_slug(name), "reward", known, self.backbone, times=share)
            run.judge(f"test-{_slug(name)}", model, data / "test.jsonl", 1)

    @property
    def sources(self) -> Sources | None:
        return selftrain.named_sources(selftrain.parse(["--recipe", str(self.recipe)]))

    @property
    def human(self) -> list[Path]:
        """The human rationales, where the settings put them into every arm."""
        return [self.step("data") / "human.jsonl"] if self.settings()[0].mix_human else []

    @property
    def backbone(self) -> Path:
        """The recipe's; the toy's is shipped and laid into the world, or pre-trained by a step of the run."""
        if self.sources:
            return Path(self.sources.backbone)
        shipped = self.step("world") / "backbone/model"
        return shipped if shipped.exists() else self.step("backbone") / "model"

    def step(self, name: str, arm: str = "main") -> Path:
        """A step's directory in an arm, by the step's name."""
        run = self.place / _slug(arm)
        return step_paths(run).get(name, run / "steps" / f"00-{name}")


def _slug(name: str) -> str:
    return name.replace("'", "").replace(",", "").replace(" ", "-")


# ---------------------------------------------------------------------------------- comparing

MAIN = (
    "longer response",
    "backbone",
    "discriminative",
    "generative",
    "initial",
    "round 1",
    "round 2",
    "round 3",
)
MAIN += ("labelled only, 2x steps", "fine-tuned", "voting@16")
SINGLES = ("true labels on the pool", "generative, true labels on the pool")
SINGLES += ("labelled, without the human rationales", "human rationales alone")
LENGTHS = {"labelled only, 0.5x steps": 0.5, "labelled only, 1.5x steps": 1.5}
# What the paper says or argues, as a difference that should be above zero.
CLAIMS = [
    ("the first judge beats the rule that the longer response wins", "initial", "longer response"),
    ("self-training gains over its start, same steps", "round 3", "initial"),
    ("and over the labelled pairs trained twice as long", "round 3", "labelled only, 2x steps"),
    ("and half as long", "round 3", "labelled only, 0.5x steps"),
    ("and one and a half times as long", "round 3", "labelled only, 1.5x steps"),
    ("a rationale before the label beats the label alone", "initial", "generative"),
    ("and a scalar head", "initial", "discriminative"),
    ("the first round gains", "round 1", "initial"),
    ("the second round gains", "round 2", "round 1"),
    ("the third round gains", "round 3", "round 2"),
    ("the last fine-tuning gains", "fine-tuned", "round 3"),
    ("sixteen votes beat one", "voting@16", "fine-tuned"),
    ("denoising helps", "round 3", "no denoising"),
    ("label filters by themselves help", "round 3", "no label filters"),
    ("rationale filters by themselves help", "round 3", "no rationale filters"),
    ("the rule of coherence helps", "round 3", "no coherence rule"),
    ("agreement of the two orders helps", "round 3", "no agreement"),
    ("the share of votes helps", "round 3", "no confidence"),
    ("a prover beats the judge's own rationales", "round 3", "the judge's own rationales"),
    ("equation 5 beats a random eligible proof", "round 3", "random eligible proof"),
    ("and the numerator alone", "round 3", "by the numerator alone"),
    ("and the contrast of the two labels", "round 3", "by the label contrast"),
    ("what a rationale says matters", "initial", "shuffled rationales"),
    ("starting again beats going on", "round 3", "continued, not restarted"),
    ("labelled pairs add to the human rationales", "initial", "human rationales alone"),
    ("human rationales add to the labelled pairs", "initial", "labelled, without the human rationales"),
    ("rationales beat the true labels of all pairs", "round 3", "generative, true labels on the pool"),
    ("true labels of the pool would do better still", "true labels on the pool", "round 3"),
]


def judged(seed: Seed, row: str) -> Path:
    """The judged test pairs behind a row of the table."""
    if row in LOOPS:
        return seed.step(seed.end_of(LOOPS[row]), row) / "judged.jsonl"
    arm = "other lengths" if row in LENGTHS else "single models" if row in SINGLES else "main"
    return seed.step(f"test-{_slug(row)}", arm) / "judged.jsonl"


def right(judged: Path, domain: str | None = None) -> np.ndarray:
    """1 for each pair (of a domain) that was judged right, else 0."""
    rows = (each for each in read_rows(judged) if domain in (None, each["pair"].get("domain")))
    return np.array([is_right(each) for each in rows], dtype=float)


def hits_by_seed(seeds: Sequence[Seed], row: str, domain: str | None = None) -> dict[int, np.ndarray]:
    paths = {seed.number: judged(seed, row) for seed in seeds}
    return {n: right(path, domain) for n, path in paths.items() if (path.parent / "done.json").is_file()}


def interval(drawn: np.ndarray) -> list[float]:
    return [round(100 * float(value), 2) for value in np.quantile(drawn, (0.025, 0.975))]


def mean_with_interval(per_seed: list[np.ndarray], seed: int = 0) -> dict[str, Any]:
    """The mean over seeds in points; seeds are drawn with replacement, then pairs within each."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        chosen = (per_seed[i] for i in rng.integers(len(per_seed), size=len(per_seed)))
        drawn.append(
            np.mean([values[rng.integers(len(values), size=len(values))].mean() for values in chosen])
        )
    mean = float(np.mean([values.mean() for values in per_seed]))
    return {"mean": round(100 * mean, 2), "interval": interval(np.array(drawn)), "seeds": len(per_seed)}


def compare(found: dict[str, dict[int, np.ndarray]], one: str, other: str) -> dict[str, Any] | None:
    """One row less another, seed by seed and in the mean."""
    both = [seed for seed in found.get(one, {}) if seed in found.get(other, {})]
    if not both:
        return None
    differences = [found[one][seed] - found[other][seed] for seed in both]
    seeds = {}
    for seed, values in zip(both, differences, strict=True):
        each = average("", [values])  # as a run itself says what it gained
        seeds[str(seed)] = {"difference": each["value"], "interval": [each["low"], each["high"]]}
    above = sum(each["interval"][0] > 0 for each in seeds.values())
    below = sum(each["interval"][1] < 0 for each in seeds.values())
    return {**mean_with_interval(differences), "above zero": above, "below zero": below, "by seed": seeds}


def differences(
    found: dict[str, dict[int, np.ndarray]], claims: Iterable[tuple[str, str, str]]
) -> list[dict]:
    """Those claims of which both rows are there."""
    return [
        {"claim": claim, "of": one, "less": other, **figures}
        for claim, one, other in claims
        if (figures := compare(found, one, other))
    ]


def collect(seeds: Sequence[Seed]) -> dict[str, Any]:
    settings, trainings = seeds[0].settings()
    rows = (*MAIN[:-1], f"voting@{settings.test_votes}", *LENGTHS, *LOOPS, *SINGLES)
    found = {row: hits_by_seed(seeds, row) for row in rows}
    torch.set_num_threads(trainings["reward"].threads)  # which the result's environment names
    results = [read_json(path) for s in seeds if (path := s.place / "main/results.json").is_file()]
    domains = sorted({domain for each in results for row in each["rows"] for domain in row["by_domain"]})
    return {
        "settings": {"self-training": asdict(settings), "judge": asdict(trainings["reward"])},
        "seeds": sorted({seed for values in found.values() for seed in values}),
        "accuracy": {
            row: mean_with_interval(list(values.values()))
            | {"by seed": {str(s): round(100 * float(each.mean()), 2) for s, each in values.items()}}
            for row, values in found.items()
            if values
        },
        "by domain": {
            domain: {
                row: mean_with_interval(list(values.values()))
                for row in rows
                if (values := hits_by_seed(seeds, row, domain))
            }
            for domain in domains[: len(domains) * (len(domains) > 1)]
        },
        "differences": differences(found, CLAIMS),
        "rounds": {str(each["seed"]): each["rounds"] for each in results},
        "signals": {str(each["seed"]): each["signals"] for each in results if each.get("signals")},
        "seconds": {str(each["seed"]): round(sum(each["seconds"].values())) for each in results},
    }


# ---------------------------------------------------------------------------------- the command


def numbers(text: str) -> list[int]:
    """112-121, or 3,5,8."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(each) for each in text.split(",")]


def run_arms(seed: Seed, wanted: Callable[[str], bool]) -> None:
    if wanted("main"):
        seed.main()
    for arm, loop in LOOPS.items():
        if wanted(arm):
            seed.loop(arm, loop)
    if wanted("single models"):
        seed.singles()
    if wanted("other lengths"):
        seed.lengths()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arms = ["main", *LOOPS, "single models", "other lengths"]
    parser.add_argument("--seeds", type=numbers, default=numbers("112-121"), help="[112-121]")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, metavar="ARM", help="; ".join(arms))
    parser.add_argument("--recipe", type=Path, default=common.ROOT / "recipes/toy.toml")
    parser.add_argument("--collect", action="store_true", help="only make the table of what is there")
    parser.add_argument("--out", type=Path, help="JSON of the table [benchmarks/results/RECIPE.json]")
    arguments = parser.parse_args()
    seeds = [Seed(number, arguments.recipe.resolve()) for number in arguments.seeds]
    if not arguments.collect:
        for seed in seeds:
            run_arms(seed, arguments.arms.__contains__)
        return 0
    result = collect(seeds)
    if arguments.out:
        write_json(arguments.out, result)
    else:
        common.write_result(arguments.recipe.stem, result)
    for row, figures in result["accuracy"].items():
        print(f"{row:42} {figures['mean']:6.2f} {figures['interval']} {list(figures['by seed'].values())}")
    for each in result["differences"]:
        what, above = f"{each['of']} - {each['less']}", f"{each['above zero']} of {each['seeds']}"
        print(f"{what}: {each['mean']} {each['interval']}, above zero in {above}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
