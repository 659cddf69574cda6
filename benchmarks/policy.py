"""What a reward model's rewards make of a policy, and what its best of n is worth, in the toy shop.

    python benchmarks/policy.py runs/toy-seeds/seed-*/main       all parts; the same command goes on

Takes finished self-training runs of the toy, one for each seed. In each, a clerk that has read both lists of
some unlabelled pairs, right or wrong alike, is the policy: `train.py --stage policy` then optimises it with
each reward, under the recipe's settings and on questions without labels. The judges are the run's own. True
success, which only this script knows and which trains nothing, is taken on held-out questions: the share of
answers that are right throughout, and of single prices; of drawn answers, and of the greedy one. The greedy
answer before training shows what a policy gains by merely becoming surer of itself.

Best of n: of 64 answers of the untrained policy the paper's linear search picks one after each; beside it
the scalar's favourite, the oracle (some answer is right) and chance (the mean of the first n).

Parts lie under runs/policy/seed-S. Intervals are bootstrap, 95%, over the questions within each seed, and
differences are paired by question. The result is benchmarks/results/policy.json.

Left out: several policies per seed, and rewards from models larger than the policy.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import common

from gramr2 import parallel
from gramr2.extras import policy, policy_start
from gramr2.extras.evaluate import average
from gramr2.extras.policy_settings import PolicySettings
from gramr2.files import InputError, digest, exit_status, read_json, write_json
from gramr2.judge import RewardModel
from gramr2.rankings import preference
from gramr2.recipes import resolve
from gramr2.sampler import generate
from gramr2.weights import load

RECIPE = common.ROOT / "recipes/toy.toml"
# Name of the row: the reward, and which of the run's models gives it. A tournament of eight asks 28 times,
# eight comparisons with the greedy answer 8 times; with these sizes a batch costs the judge about the same.
SMALL = {"batch_size": 64, "group": 4}
REWARDS = {
    "reasoning, pairwise": ("pairwise", "fine-tune", {}),
    "reasoning, tournament": ("tournament", "fine-tune", SMALL),
    "label only, pairwise": ("pairwise", "generative", {}),
    "scalar": ("scalar", "discriminative", {}),
}
QUESTIONS, DRAWN = 300, 4  # held-out questions, and answers drawn for each
LISTS, MOST = 100, 64  # held-out questions of the best of n
SIZES = 1, 2, 4, 8, 16, 32, 64
ANSWER, VERDICT = 24, 128  # tokens


class Shop:
    """A run's world: its questions, and what is true in it."""

    def __init__(self, run: Path):
        self.run, self.seed = run, read_json(run / "results.json")["seed"]
        self.world = self.place("world")
        backbones = [*run.glob("steps/*-backbone/model"), self.world / "backbone" / "model"]
        self.backbone = next(path for path in backbones if (path / "config.json").is_file())
        rows = [json.loads(line) for line in (self.world / "test.jsonl").read_text().splitlines()]
        self.questions = [row["question"] for row in rows]
        right = (row[f"response_{row['label'].lower()}"] for row in rows)
        self.prices = dict(found for each in right for found in re.findall(r"(\w+) (\d)", each))

    def place(self, step: str) -> Path:
        found = next(self.run.glob(f"steps/[0-9][0-9]-{step}"), None)
        if found is None:
            raise InputError(f"{self.run}: has no step {step}; give finished runs of selftrain.py in the toy")
        return found

    def quality(self, question: str, answer: str) -> tuple[float, float]:
        """(right throughout, share of right prices): each good that was asked for, in order, nothing else."""
        asked = question.removeprefix("price of ").rstrip("?").split()
        right = [f"{good} {self.prices.get(good)}" for good in asked]
        said = answer.strip().rstrip(".").split(", ")
        return float(said == right), sum(each in said for each in right) / len(right)


def answers(model: Path, questions: list[str], n: int, temperature: float = 1.0) -> list[list[str]]:
    decoder, tokenizer = load(model)
    asked = [tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
    how = {"max_new_tokens": ANSWER, "temperature": temperature, "progress": False, "seed": 1}
    drawn = generate(decoder, asked, n=n, **how)
    return [[tokenizer.decode(sample.ids).strip() for sample in group] for group in drawn]


def success(shop: Shop, model: Path) -> dict[str, list[float]]:
    """Of each held-out question: the drawn answers' means, and whether the greedy one is right."""
    questions = shop.questions[:QUESTIONS]
    drawn, greedy = answers(model, questions, DRAWN), answers(model, questions, 1, 0.0)
    graded = [
        [shop.quality(question, each) for each in group]
        for question, group in zip(questions, drawn, strict=True)
    ]
    right, prices = ([sum(each[i] for each in group) / DRAWN for group in graded] for i in (0, 1))
    sure = [shop.quality(question, each)[0] for question, (each,) in zip(questions, greedy, strict=True)]
    return {"right": right, "prices": prices, "greedy": sure}


def optimised(shop: Shop, start: Path, name: str, out: Path) -> dict[str, list[float]]:
    kind, step, sizes = REWARDS[name]
    judge = shop.place(step) / "model"
    given = {"reward": kind, "seed": shop.seed, "device": "cpu", **sizes}
    settings = resolve(PolicySettings, RECIPE, ["train", "train.policy"], given)
    reward = policy.Judged(RewardModel.load(judge), settings)
    policy.train(settings, [shop.world / "unlabelled.jsonl"], start, out, reward, judge)
    return success(shop, out / "model")


def best_of_n(shop: Shop, start: Path) -> dict[str, dict[str, list[float]]]:
    """{way: {n: whether each question's pick is right}}."""
    questions = shop.questions[:LISTS]
    drawn = answers(start, questions, MOST)
    different = [list(dict.fromkeys(group)) for group in drawn]
    right = [[shop.quality(q, each)[0] for each in group] for q, group in zip(questions, drawn, strict=True)]
    curves = {
        "oracle": {n: [max(each[:n]) for each in right] for n in SIZES},
        "chance": {n: [sum(each[:n]) / n for each in right] for n in SIZES},
    }
    for way, step in {
        "reasoning": "fine-tune",
        "label only": "generative",
        "scalar": "discriminative",
    }.items():
        judge = RewardModel.load(shop.place(step) / "model")
        picks = [favourites, searched][judge.format.endings is not None](judge, questions, different)
        curves[way] = {}
        for n in SIZES:
            best = [at[len(set(group[:n])) - 1] for at, group in zip(picks, drawn, strict=True)]
            graded = zip(questions, best, different, strict=True)
            curves[way][n] = [shop.quality(q, texts[i])[0] for q, i, texts in graded]
    return {way: {str(n): values for n, values in curve.items()} for way, curve in curves.items()}


def favourites(judge: RewardModel, questions: list[str], lists: list[list[str]]) -> list[list[int]]:
    """For each list: the highest score among its first one, two, three …"""
    picks = []
    for question, texts in zip(questions, lists, strict=True):
        scores = judge.reward([question] * len(texts), texts)
        picks.append([max(range(n), key=scores.__getitem__) for n in range(1, len(texts) + 1)])
    return picks


def searched(judge: RewardModel, questions: list[str], lists: list[list[str]]) -> list[list[int]]:
    """The same by linear search, which keeps the best so far; one greedy vote in each order."""
    how = {"votes": 2, "temperature": 0.0, "max_new_tokens": VERDICT, "progress": False}
    picks = []
    found = judge.contests(list(zip(questions, lists, strict=True)), "linear", False, **how)
    for texts, ranking in zip(lists, found, strict=True):
        best = [0]
        for challenger in range(1, len(texts)):
            won = preference(ranking.answers[challenger, best[-1]]) > 0.5
            best.append(challenger if won else best[-1])
        picks.append(best)
    return picks


def part(path: Path, work: Callable) -> dict:
    """A finished part is read, another one is done and written whole."""
    if not path.is_file():
        write_json(path, work())
    return read_json(path)


def measure(run: Path) -> dict:
    shop = Shop(run)
    place = Path("runs/policy") / f"seed-{shop.seed}"
    judges = sorted({shop.place(step) / "model" / "model.safetensors" for _, step, _ in REWARDS.values()})
    about = {str(path): digest(path) for path in judges}
    if part(place / "judges.json", lambda: about) != about:
        raise InputError(f"{place}: holds results of other judges than those of {run}; remove it")
    settings = resolve(PolicySettings, RECIPE, ["train", "train.policy"], {"seed": shop.seed})
    with parallel.join_ranks(settings) as ranks:
        start = policy_start.imitate(shop.world, shop.backbone, place / "start", ranks, settings)
        found = {"before": part(place / "before.json", lambda: success(shop, start))}
        for name in REWARDS:
            out = place / name.replace(", ", "-").replace(" ", "-")
            found[name] = part(out / "success.json", lambda n=name, o=out: optimised(shop, start, n, o))
        curves = part(place / "best-of-n.json", lambda: best_of_n(shop, start))
    return {"seed": shop.seed, "success": found, "curves": curves}


def summary(seeds: list[dict]) -> dict:
    """Rows of the table from the seeds' figures by question."""

    def over(name: str, take: Callable) -> dict:
        return average(name, [take(seed["success"]) for seed in seeds])

    def gap(one: str, other: str) -> Callable:
        return lambda found: [a - b for a, b in zip(found[one]["right"], found[other]["right"], strict=True)]

    rows = []
    for name in ("before", *REWARDS):
        row = {kind: over(name, lambda f, n=name, k=kind: f[n][k]) for kind in ("right", "prices", "greedy")}
        row |= {"gain": over(name, gap(name, "before")), "over scalar": over(name, gap(name, "scalar"))}
        row["right by seed"] = [round(100 * fmean(seed["success"][name]["right"]), 1) for seed in seeds]
        rows.append({"name": name, **row})
    ways = seeds[0]["curves"]
    curves = {
        way: {n: average(way, [seed["curves"][way][n] for seed in seeds]) for n in ways[way]} for way in ways
    }
    return {"seeds": [seed["seed"] for seed in seeds], "rows": rows, "curves": curves}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="finished self-training runs of the toy")
    arguments = parser.parse_args(argv)
    result = summary([measure(run) for run in arguments.runs])
    about = {"questions": QUESTIONS, "drawn": DRAWN, "lists": LISTS}
    common.write_result("policy", about | result)
    for row in result["rows"]:
        print(
            f"{row['name']:24} right {row['right']['value']:5.1f}  gain {row['gain']['value']:+5.1f}", end=""
        )
        print(
            f" [{row['gain']['low']:+.1f}, {row['gain']['high']:+.1f}]  greedy {row['greedy']['value']:.1f}"
        )
    for way, curve in result["curves"].items():
        print(f"{way:12}", *(f"{n}: {each['value']:.0f}" for n, each in curve.items()), sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
