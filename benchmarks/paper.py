"""The study: what the paper reports and argues, at the toy's scale. Hours on two cores; resumable.

    python benchmarks/paper.py --part arms         every arm of study.py, which makes the table
    python benchmarks/paper.py --part gram         GRAM: pre-training on unlabelled responses, then labels
    python benchmarks/paper.py --part amount       figure 5: accuracy against the amount of synthesized data
    python benchmarks/paper.py --part adaptation   figure 4: units of task data, from four models
    python benchmarks/paper.py --collect           benchmarks/results/paper.json from what is there

Figure 3, best-of-n, is benchmarks/policy.py. Every part works on the runs of study.py (runs/toy-seeds), which
it makes where they are missing: the prover, the proofs and the judges are theirs.

Two families of tasks stand for figure 4's two domains. *New prices*: a quarter of the shop's goods cost
something else now, and questions ask for these. *Five goods*: longer questions at the old prices. A unit is
one pair with its label and, for the models that reason, a rationale.

Left out: the real data's scale; whether a direction found here holds there.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import study
from study import Seed, mean_with_interval

from gramr2.data import Store
from gramr2.extras import toyworld
from gramr2.files import read_rows, write_rows
from gramr2.records import Pair
from gramr2.steps import Run

AMOUNTS = (30, 60, 120, 240, 480)
FAMILIES = "new prices", "five goods"
UNITS = (0, 25, 50, 100)
TASK_TEST = 300
TASK_STEPS = 100
TASK_TOKENS = 160  # a rationale about five goods takes 123
SMOOTHING = 0.1

Figures = dict[str, np.ndarray]  # row → whether each held-out pair was judged right


class Bench:
    """A seed's extra steps, in a directory of their own beside the arms of study.py."""

    def __init__(self, seed: Seed, part: str, **changes: Any):
        self.seed, self.run = seed, seed.open(part, Run, changes)
        self.test = seed.step("data") / "test.jsonl"

    def model(self, step: str) -> Path:
        return self.seed.step(step) / "model"

    def train(self, name: str, stage: str, data: Sequence[Path], start: Path, **changes: Any) -> Path:
        """A training step under the seed's settings with some of them changed."""
        trainings = self.run.trainings | {stage: replace(self.run.trainings[stage], **changes)}
        return Run(self.run.directory, self.run.settings, trainings, {}).train(name, stage, data, start)

    def hits(self, name: str, model: Path, pairs: Path) -> np.ndarray:
        return study.right(self.run.judge(f"test-{name}", model, pairs, 1))

    def write(self, name: str, rows: Iterator[dict[str, Any]]) -> Path:
        with self.run.directory.step(name) as step:
            if step.to_do:
                step.close({"file": write_rows(step.path / "pairs.jsonl", rows).name})
        return step.path / "pairs.jsonl"

    @property
    def synthesized(self) -> list[Path]:
        """What the judges of `main` trained on, the human rationales apart, in the order in which it came."""
        rounds = [f"round-{n + 1}-rationales" for n in range(self.run.settings.iters)]
        return [self.seed.step(name) / "kept.jsonl" for name in ("filter-labelled", *rounds)]

    def gram(self) -> Path:
        """GRAM (arXiv 2506.14175): responses of unlabelled pairs, then the labels with smoothing."""
        judge = self.run.trainings["reward"]
        data = self.seed.step("data")
        batches = [data / f"unlabelled-{n + 1}.jsonl" for n in range(self.run.settings.iters)]
        responses = self.write(
            "responses",
            (
                {"prompt": pair.question, "response": response}
                for batch in batches
                for pair in Store(batch, Pair.from_json)
                for response in (pair.response_a, pair.response_b)
            ),
        )
        same = {"steps": judge.steps, "lr": judge.lr, "weight_decay": judge.weight_decay}
        begun = self.train("gram-pretrain", "pretrain", [responses], self.seed.backbone, **same)
        labelled = [data / "labelled.jsonl"]
        return self.train("gram", "generative", labelled, begun, label_smoothing=SMOOTHING)


# ---------------------------------------------------------------------------------- the parts


def gram(seed: Seed) -> Figures:
    bench = Bench(seed, "gram")
    return {"GRAM": bench.hits("gram", bench.gram(), bench.test)}


def amount(seed: Seed) -> Figures:
    """Figure 5: the first N synthesized pairs: those with given labels, then what each round kept."""
    bench, figures = Bench(seed, "amount"), {}
    pairs = [row for path in bench.synthesized for row in read_rows(path)]
    backbone = seed.backbone
    for count in (*(n for n in AMOUNTS if n < len(pairs)), len(pairs)):
        shown = "all" if count == len(pairs) else str(count)
        data = bench.write(f"first-{shown}", iter(pairs[:count]))
        model = bench.train(f"train-{shown}", "reward", [*seed.human, data], backbone)
        figures[shown] = bench.hits(shown, model, bench.test)
    return figures


def _tasks(seed: Seed) -> Iterator[tuple[str, list[Pair]]]:
    """Two families of the shop's questions that the seed's run has not seen, with rationales."""
    rng = random.Random(f"tasks {seed.number}")
    world = toyworld.prices_of(seed.number, (names := toyworld.good_names(160)))
    changed = names[:40]
    new = {good: rng.choice([p for p in range(1, 10) if p != world[good]]) for good in changed}
    for family, (goods, asked, prices) in zip(FAMILIES, ((changed, 3, new), (names, 5, world)), strict=True):
        sets: dict[frozenset[str], tuple[str, ...]] = {}
        while len(sets) < max(UNITS) + TASK_TEST:
            drawn = tuple(rng.sample(goods, asked))
            sets.setdefault(frozenset(drawn), drawn)
        yield family, [toyworld.make_pair(each, prices, rng, "human") for each in sets.values()]


def adaptation(seed: Seed) -> Figures:
    """Figure 4: accuracy on a task after units of its data, from four models."""
    bench, figures = Bench(seed, "adaptation", judge_tokens=TASK_TOKENS), {}
    trained_gram = Bench(seed, "gram").gram()
    starts = {
        "GRAM-R²": ("reward", bench.model("fine-tune"), {}),
        "generative": ("generative", bench.model("generative"), {}),
        "GRAM": ("generative", trained_gram, {"label_smoothing": SMOOTHING}),
        "from the backbone": ("reward", seed.backbone, {}),
    }
    for family, pairs in _tasks(seed):
        slug = family.replace(" ", "-")
        test = bench.write(f"{slug}-test", (p.to_json() for p in pairs[max(UNITS) :]))
        for units in UNITS:
            data = bench.write(f"{slug}-{units}", (p.to_json() for p in pairs[:units]))
            for name, (kind, start, changes) in starts.items():
                step = f"{slug}-{units}-{name.replace(' ', '-')}"
                changes = {**changes, "steps": TASK_STEPS}
                model = bench.train(step, kind, [data], start, **changes) if units else start
                figures[f"{family}: {name}, {units}"] = bench.hits(step, model, test)
    return figures


PARTS = {"gram": gram, "amount": amount, "adaptation": adaptation}


def claims() -> Iterator[tuple[str, str, str]]:
    """What the paper says, as a row that should be above another."""
    yield "reasoning on the unlabelled pairs beats GRAM", "fine-tuned", "GRAM"
    yield "GRAM's pre-training helps the label alone", "GRAM", "generative"
    for few, more in itertools.pairwise([*map(str, AMOUNTS), "all"]):
        yield "figure 5: more synthesized pairs help", more, few
    for family in FAMILIES:
        for other in ("generative", "GRAM", "from the backbone"):
            for units in UNITS[1:]:
                one, less = (f"{family}: {name}, {units}" for name in ("GRAM-R²", other))
                yield f"figure 4: of {units} units GRAM-R² makes more", one, less
        yield "figure 4: it needs them", f"{family}: GRAM-R², {UNITS[-1]}", f"{family}: GRAM-R², 0"


def collect(seeds: Sequence[Seed]) -> dict[str, Any]:
    """Means over the seeds whose part is whole; a part is asked again, and finds its steps done."""
    result: dict[str, Any] = {"seeds": {}}
    found = {row: study.hits_by_seed(seeds, row) for row in ("generative", "fine-tuned")}
    for part, work in PARTS.items():
        whole = [seed for seed in seeds if (seed.place / part / "whole").is_file()]
        rows: dict[str, dict[int, np.ndarray]] = {}
        for seed in whole:
            for name, values in work(seed).items():
                rows.setdefault(name, {})[seed.number] = values
        result[part] = {name: mean_with_interval(list(values.values())) for name, values in rows.items()}
        result["seeds"][part] = [seed.number for seed in whole]
        found |= rows
    return result | {"differences": study.differences(found, claims())}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=["arms", *PARTS], default=["arms", *PARTS])
    parser.add_argument("--seeds", type=study.numbers, default=study.numbers("112-114"), help="[112-114]")
    parser.add_argument("--recipe", type=Path, default=common.ROOT / "recipes/toy.toml")
    parser.add_argument("--collect", action="store_true", help="only make the table of what is there")
    arguments = parser.parse_args()
    seeds = [Seed(number, arguments.recipe.resolve()) for number in arguments.seeds]
    if arguments.collect:
        common.write_result("paper", collect(seeds))
        return 0
    for seed in seeds:
        wanted = arguments.part
        study.run_arms(seed, lambda arm, wanted=wanted: "arms" in wanted or arm == "main")
        for part in (part for part in PARTS if part in wanted):
            PARTS[part](seed)
            (seed.place / part / "whole").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
