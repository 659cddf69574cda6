"""What judgments are worth: the benchmarks of the paper, intervals, calibration; from written files alone.

A benchmark's averages are as its authors define them, each under its own name (`BENCHMARKS`). A pair that
could not be judged, and a verdict that could not be read, count as wrong. Intervals are bootstrap, 95%: the
units (prompts of RM-Bench, questions of PPE, else pairs) are drawn anew within each group of an average.

Beside the averages stands how far the judge can be trusted (`reliability`): how often its two orders agree,
how many votes were unreadable, and what its probabilities are worth. `fit_calibrator` maps them to observed
frequencies by isotonic regression; judge.py applies the map that lies in a model's directory. And of a
prover's proofs, `score_leanings` says what the score that picks them rewards: copying, or length.

It leaves out: judging (judge.py), and anything that trains or filters; the truth stops here.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from gramr2.data import Store
from gramr2.directories import model_file
from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, need, write_json
from gramr2.records import OTHER, UNDECIDED, Judgment, Pair, nothing_read

RESAMPLES = 2000
BINS = 10  # of ECE, over confidences from 0.5 to 1
FEWEST = 30  # labelled pairs that a calibrator can be fitted on
# What a row tells of how it came to be, which is no setting of its judge: the code, what it ran on, and the
# day that the chat template printed. One file may hold several.
TOLD = ("code", "device", "date")


class Average(dict[str, Any]):
    """A line of a table, which knows what it is the average of: so the lines of two judges can be paired."""

    groups: Sequence[np.ndarray] = ()
    weights: Sequence[float] = ()

    def less(self, other: Average) -> JsonRow:
        """The difference to another judge's on the same items, unit by unit."""
        differ = [a - b for a, b in zip(self.groups, other.groups, strict=True)]
        return average(self["name"], differ, self.weights)


def average(
    name: str, groups: Sequence[Sequence[float]], weights: Sequence[float] = (), seed: int = 0
) -> JsonRow:
    """The mean of the groups' means in per cent, with its interval. `weights`: none are equal ones."""
    values, weights = [np.asarray(group, dtype=float) for group in groups], weights or [1] * len(groups)
    rng = np.random.default_rng(seed)
    drawn = np.zeros(RESAMPLES)
    for each, weight in zip(values, weights, strict=True):
        draws = (rng.integers(len(each), size=(100, len(each))) for _ in range(RESAMPLES // 100))
        drawn += np.concatenate([each[units].mean(1) for units in draws]) * (weight / sum(weights))
    low, high = np.quantile(drawn, (0.025, 0.975))
    mean = fmean((each.mean() for each in values), weights)
    figures = {"value": mean, "low": min(low, mean), "high": max(high, mean)}  # outside by rounding alone
    rounded = {key: round(100 * float(value), 2) for key, value in figures.items()}
    found = Average(name=name, **rounded, n=sum(map(len, values)))
    found.groups, found.weights = values, weights
    return found


def is_right(row: JsonRow) -> bool:
    return row.get("label") is not None and row["label"] == row["pair"]["label"]


def by_domain(rows: Iterable[JsonRow], right: Callable[[JsonRow], float]) -> dict[str, list[float]]:
    found = defaultdict(list)
    for row in rows:
        found[row["pair"].get("domain") or "all"].append(right(row))
    return found


# ---------------------------------------------------------------------------------- what a score rewards


def copied_share(pair: Pair, text: str) -> float:
    """The share of a text's runs of five words that stand in the question or in a response."""

    def runs(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return list(zip(*(words[start:] for start in range(5)), strict=False))

    known = {run for text in (pair.question, pair.response_a, pair.response_b) for run in runs(text)}
    return fmean([run in known for run in runs(text)] or [0.0])


def score_leanings(proved: Iterable[JsonRow]) -> JsonRow:
    """Rank correlation of the proofs' score with what they copy and with their length in tokens.

    `proved`: rows of a proving step that have their candidates. Scores are compared within a pair only, so
    the correlation (Spearman's) is each pair's own, and its mean is over the pairs in which both vary.
    """
    found: dict[str, list[float]] = {"copied": [], "length": []}
    for row in proved:
        pair = Pair.from_json(row["pair"])
        scored = [proof for proof in row["candidates"] if proof["score"] is not None]
        scores = [proof["score"] for proof in scored]
        copied = [copied_share(pair, proof["text"]) for proof in scored]
        for name, values in (("copied", copied), ("length", [len(proof["ids"]) for proof in scored])):
            if len(set(scores)) > 1 and len(set(values)) > 1:
                found[name].append(float(np.corrcoef(_ranks(scores), _ranks(values))[0, 1]))
    means = {name: round(fmean(each), 3) if each else None for name, each in found.items()}
    return means | {"pairs": {name: len(each) for name, each in found.items()}}


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    return [sum(v < each for v in values) + (values.count(each) - 1) / 2 for each in values]


# ---------------------------------------------------------------------------------- the benchmarks


def _mean_of(groups: Mapping[str, Sequence[float]], order: Sequence[str], what: str) -> Iterator[JsonRow]:
    """Each group's average, and their mean under a name that says how many there are."""
    present = sorted(groups, key=lambda name: order.index(name) if name in order else len(order))
    yield from (average(name, [groups[name]]) for name in present)
    words = {4: "the four", 5: "the five", 6: "the six"} if len(present) == len(order) else {}
    whole = words.get(len(present), f"{len(present)}")
    yield average(f"mean of {whole} {what}", list(groups.values()))


RM_DOMAINS = ("chat", "math", "code", "safety")
# Cells of the matrix: its row is the chosen response, its column the rejected one.
LEVELS = {"easy": np.tri(3, k=-1), "normal": np.eye(3), "hard": np.tri(3, k=-1).T}


def rm_bench(rows: list[JsonRow]) -> tuple[list[JsonRow], str]:
    """Nine pairs a prompt; a domain's accuracy is the mean of its 3x3 matrix, overall that of the domains."""
    cells: dict[tuple, np.ndarray] = defaultdict(lambda: np.full((3, 3), np.nan))
    for row in rows:
        meta = row["pair"]["meta"]
        prompt = row["pair"]["domain"], meta["subset"], meta["prompt"]
        cells[prompt][meta["chosen"], meta["rejected"]] = is_right(row)
    domains = defaultdict(list)
    for (domain, *_), matrix in cells.items():
        if not np.isnan(matrix).any():
            domains[domain].append(matrix)
    left_out = len(cells) - sum(map(len, domains.values()))
    if not domains:
        raise InputError("rm-bench: no prompt with all of its nine pairs")
    whole = {domain: [each.mean() for each in matrices] for domain, matrices in domains.items()}
    averages = list(_mean_of(whole, RM_DOMAINS, "domains (overall)"))
    for level, mask in LEVELS.items():
        parts = [[(each * mask).sum() / 3 for each in matrices] for matrices in domains.values()]
        averages.append(average(f"{level}, mean of the domains", parts))
    lines = [f"{left_out} prompts without all nine pairs are left out"] if left_out else []
    for domain, matrices in domains.items():
        lines += [f"{domain}: chosen (rows) against rejected: concise, plain, markdown"]
        lines += ["  " + " ".join(f"{100 * cell:6.1f}" for cell in row) for row in np.mean(matrices, axis=0)]
    return averages, "\n".join(lines)


CATEGORIES = ("knowledge", "reasoning", "math", "coding")


def verdicts(row: JsonRow) -> list[str | None]:
    """What most votes of each order say; one verdict of a judge without votes, which knows no order."""
    if not row.get("details"):
        return [row.get("label")]
    leads = {"AB": 0, "BA": 0}
    for vote in row["details"]:
        leads[vote["order"]] += {"A": 1, "B": -1, None: 0}[vote["label"]]
    return ["A" if lead > 0 else "B" if lead < 0 else None for lead in leads.values()]


def both_orders(row: JsonRow) -> int:
    """JudgeBench's rule: the sum of +1 for each order's verdict for the label, and -1 for one against it."""
    truth, said = row["pair"]["label"], verdicts(row)
    return said.count(truth) - said.count(OTHER[truth])


def mean_order(row: JsonRow, unread: float, equal: float) -> float:
    """How often a verdict is right if chance draws the order. `unread`: what one without a letter is worth;
    `equal`: what equal scores are."""
    if "error" in row:
        return 0.0
    undecided = unread if row.get("details") else equal
    worth = {row["pair"]["label"]: 1.0, None: undecided}
    return fmean(worth.get(verdict, 0.0) for verdict in verdicts(row))


def judgebench(rows: list[JsonRow]) -> tuple[list[JsonRow], str]:
    """Correct when both orders' verdicts together are for the label."""
    groups = by_domain(rows, lambda row: both_orders(row) > 0)
    averages = list(_mean_of(groups, CATEGORIES, "categories (the paper's Overall)"))
    return [*averages, average("mean over pairs (the benchmark's own)", [list(chain(*groups.values()))])], ""


def labelled_pairs(rows: list[JsonRow]) -> tuple[list[JsonRow], str]:
    """Any pairs with labels, HelpSteer3's validation set among them: by domain, and over all."""
    groups = by_domain(rows, is_right)
    averages = list(_mean_of(groups, sorted(groups), "domains"))
    return [*averages, average("mean over pairs", [list(chain(*groups.values()))])], ""


def ppe(rows: list[JsonRow]) -> tuple[list[JsonRow], str]:
    """Best-of-k: what a linear search has picked after k responses, the best there is, and chance."""
    paths = [_path(row) for row in rows]
    most = min(len(row["scores"]) for row in rows)  # the reader lets no row pass without one
    averages, lines = [], ["   k  picked  oracle  chance"]
    for k in (2**e for e in range(most.bit_length())):
        picked = [row["scores"][path[k - 1]] if path else 0 for row, path in zip(rows, paths, strict=True)]
        oracle = fmean(max(row["scores"][:k]) for row in rows)
        chance = fmean(fmean(row["scores"][:k]) for row in rows)
        averages.append(average(f"best of {k}", [picked]))
        lines.append(f"{k:4} {averages[-1]['value']:7.1f} {100 * oracle:7.1f} {100 * chance:7.1f}")
        averages[-1] |= {"oracle": round(100 * oracle, 2), "chance": round(100 * chance, 2)}
    return averages, "\n".join(lines)


def _path(row: JsonRow) -> list[int]:
    """The best of the first 1, 2, … responses; nothing where the list could not be judged."""
    if "error" in row:
        return []
    path = [0]
    for each in row["comparisons"]:
        path.append(each["a"] if each["p"] > UNDECIDED else each["b"])
    return path


def rewardbench(rows: list[JsonRow]) -> tuple[list[JsonRow], str]:
    """Subsets; sections, in which each has its weight; and the sections' mean (without the prior sets).

    Its authors draw one order by chance, and a verdict that cannot be read is half right.
    """
    from gramr2.extras.datasets import REWARDBENCH

    groups = by_domain(rows, partial(mean_order, unread=0.5, equal=0.0))
    found = {
        name: {one: weights[one] for one in weights if one in groups} for name, weights in REWARDBENCH.items()
    }
    found = {name: weights for name, weights in found.items() if weights}
    need(len(found) > 0, "rewardbench: no row is of one of its subsets")
    averages = [average(one, [groups[one]]) for weights in found.values() for one in weights]
    shares: dict[str, float] = {}
    for name, weights in found.items():
        averages.append(average(name, [groups[one] for one in weights], [*weights.values()]))
        shares |= {one: weight / sum(weights.values()) for one, weight in weights.items()}
    whole = f"mean of {'the four' if len(found) == 4 else len(found)} sections (the benchmark's Score)"
    return [*averages, average(whole, [groups[one] for one in shares], [*shares.values()])], ""


def llmbar(rows: list[JsonRow]) -> tuple[list[JsonRow], str]:
    """The mean of the accuracies of the two orders; what cannot be read is wrong."""
    from gramr2.extras.datasets import LLMBAR

    groups = by_domain(rows, partial(mean_order, unread=0.0, equal=0.5))
    *averages, whole = _mean_of(groups, LLMBAR, "subsets (the paper's Average)")
    adversarial = [groups[name] for name in groups if name != "Natural"]
    averages += [average("mean of the adversarial subsets", adversarial)] if adversarial else []
    return [*averages, whole], ""


Prompts = dict[str, dict[str, list[JsonRow]]]  # domain → prompt → its pairs


def by_prompt(rows: Iterable[JsonRow]) -> tuple[Prompts, str]:
    """The prompts all of whose pairs are there; and a line on the others."""
    found: Prompts = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["pair"]["domain"]][row["pair"]["meta"]["prompt"]].append(row)
    whole = {
        domain: {
            name: each for name, each in prompts.items() if len(each) == each[0]["pair"]["meta"]["pairs"]
        }
        for domain, prompts in found.items()
    }
    left_out = sum(map(len, found.values())) - sum(map(len, whole.values()))
    need(any(whole.values()), "no prompt with all of its pairs")
    whole = {domain: prompts for domain, prompts in whole.items() if prompts}
    return whole, f"{left_out} prompts without all of their pairs are left out" if left_out else ""


def best_of(rows: list[JsonRow]) -> float:
    """Whether the best response wins all of its pairs; where it is level with k others, 1 / (1 + k)."""
    leads = [-1 if "error" in row else both_orders(row) for row in rows]
    return 0.0 if min(leads) < 0 else 1 / (1 + leads.count(0))


def rewardbench2(rows: list[JsonRow]) -> tuple[list[JsonRow], str]:
    """Best of four; Ties by accuracy and margins, which scores have, or by accuracy alone; and their mean."""
    from gramr2.extras.datasets import REWARDBENCH2

    domains, more = by_prompt(rows)
    ties = domains.pop("Ties", {})
    groups = {domain: [best_of(each) for each in prompts.values()] for domain, prompts in domains.items()}
    numbers = [name.removeprefix("tied:") for name in ties if name.startswith("tied:")]
    twins = [(ties[f"ref:{number}"], ties[f"tied:{number}"]) for number in numbers if f"ref:{number}" in ties]
    what = "domains (the authors' score)"
    if twins and any(row.get("scores") for twin in twins for each in twin for row in each):
        groups["Ties"] = [tie_by_scores(*twin) for twin in twins]
    elif twins:
        groups["Ties"] = [fmean(best_of(each) == 1 for each in twin) for twin in twins]
        what = "domains (of Ties the accuracy alone)"
        more += (
            "\nTies: pairs have no margins. Half: all correct above all wrong ones; half: so is the reference"
        )
    need(len(groups) > 0, "no prompt of Ties with its reference")
    return list(_mean_of(groups, REWARDBENCH2, what)), more.strip()


def tie_by_scores(reference: list[JsonRow], tied: list[JsonRow]) -> float:
    """A prompt with many correct answers, and its twin with one: 60% accuracy, 40% margins, 1% their ratio.

    That the correct ones are above the wrong ones counts twice, and more where it is by more than the correct
    ones differ.
    """
    (gap, spread), (reference_gap, _) = _gap_and_spread(tied), _gap_and_spread(reference)
    least = min(gap, reference_gap)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.tanh(np.float64(least) / spread - 1), nan=0.0)
    accuracy = 0.3 * (gap > 0) + 0.3 * (reference_gap > 0)
    return accuracy + 0.2 * (gap > spread) + 0.2 * (least > spread) + 0.01 * float(ratio)


def _gap_and_spread(rows: list[JsonRow]) -> tuple[float, float]:
    """How far the worst correct response is above the best wrong one; how far the correct ones differ."""
    if not all(row.get("scores") for row in rows):  # a failure loses by any margin
        return -math.inf, 0.0
    correct = {row["pair"]["meta"]["chosen"]: row["scores"][0] for row in rows}.values()
    wrong = {row["pair"]["meta"]["rejected"]: row["scores"][1] for row in rows}.values()
    return min(correct) - max(wrong), max(correct) - min(correct)


def rmb(rows: list[JsonRow]) -> tuple[list[JsonRow], str]:
    """Two goals, each with pairs and with lists, whose best response has to win all of its pairs."""
    from gramr2.extras.datasets import RMB

    domains, more = by_prompt(rows)
    groups = {name: [best_of(each) == 1 for each in prompts.values()] for name, prompts in domains.items()}
    return list(_mean_of(groups, RMB, "sets (the paper's Overall)")), more


BENCHMARKS = {"rm-bench": rm_bench, "judgebench": judgebench, "ppe": ppe}
BENCHMARKS |= {"rewardbench": rewardbench, "rewardbench2": rewardbench2, "llmbar": llmbar, "rmb": rmb}
BENCHMARKS |= {"helpsteer3": labelled_pairs, "pairs": labelled_pairs}
BOTH_ORDERS = ("judgebench", "rewardbench", "rewardbench2", "llmbar", "rmb")  # whose rules need both


def read_benchmark(name: str, path: Path) -> Iterator[Pair | JsonRow]:
    """The pairs, or lists, of a published file, or of a directory's: whole and in its order."""
    from gramr2.extras.datasets import DATASETS, Source, inputs

    if name not in BENCHMARKS:
        raise InputError(f"no benchmark {name}; there are {', '.join(BENCHMARKS)}")
    left_out = Counter[str]()
    rows = ((source, *each) for source in map(Source, inputs(name, path)) for each in source)
    for source, where, row in rows:
        try:
            items = list(DATASETS[name].items(row, source))
            if any(isinstance(item, Pair) and item.label is None for item in items):
                raise InputError("its pair has no label")
        except InputError as error:
            raise InputError(f"{source.path}: {where}: {error}") from None
        left_out.update(item for item in items if isinstance(item, str))
        yield from (item for item in items if not isinstance(item, str))
    for reason, count in left_out.items():
        print(f"{path}: left out {count}: {reason}", file=sys.stderr)


def _published(row: JsonRow) -> JsonRow:
    """A row of JudgeBench's own judgment files: two decisions, the second with the responses exchanged."""
    from gramr2.extras.datasets import judgebench_pair

    pair = judgebench_pair(row)
    decisions: list[Any] = [(each or {}).get("decision") for each in row["judgments"]]
    read = [{"A>B": "A", "B>A": "B"}.get(decision) for decision in decisions]
    labels = dict(zip(("AB", "BA"), [read[0], *(OTHER[label] for label in read[1:2])], strict=False))
    lead = sum({"A": 1, "B": -1, None: 0}[label] for label in labels.values())
    return {
        "id": pair.id,
        "label": "A" if lead > 0 else "B" if lead < 0 else None,
        "p_a": None,
        "votes": {"A": 0, "B": 0, "none": decisions.count(None)} | {"judgments": len(decisions)},
        "orders_agree": len(set(labels.values())) == 1 if len(labels) == 2 else None,
        "details": [{"order": order, "label": label} for order, label in labels.items()],
        "pair": pair.to_json(),
        "judge": Fields(row).get("judge_name", str, "published"),
    }


# ---------------------------------------------------------------------------------- probabilities


def reliability(rows: Sequence[JsonRow]) -> JsonRow:
    """Agreement of the orders, abstentions, and what p_a is worth; None where there is nothing to see.

    Confidence is max(p_a, 1 - p_a). Where p_a is one half, one half of the verdict is right.
    """
    judged = [row for row in rows if "error" not in row]
    agree = [row["orders_agree"] for row in judged if row.get("orders_agree") is not None]
    votes = [vote for row in judged for vote in row.get("details") or ()]
    read = [row for row in judged if not nothing_read(row["votes"])]
    known = [(row["p_a"], row["pair"]["label"]) for row in read if row.get("p_a") is not None]
    tokens = [vote["tokens"] for vote in votes if "tokens" in vote]
    figures = {
        "failed": len(rows) - len(judged),
        "unread": len(judged) - len(read),
        "forged": sum(bool(row.get("forged")) for row in judged),
        "consistency": fmean(agree) if agree else None,
        "abstention": fmean(vote["label"] is None for vote in votes) if votes else None,
        "tokens": sum(tokens) / len(judged) if tokens else None,
        "calibrated": any(_settings(row).get("calibrated") for row in judged),
    }
    # Where nothing could be read, probabilities are worth nothing, and not one half.
    return figures | calibration(*zip(*known, strict=True)) if known else figures


def calibration(p: Sequence[float] | np.ndarray, labels: Sequence[str] | np.ndarray) -> JsonRow:
    """ECE, Brier score and the accuracy of the surer half of probabilities of A."""
    p_truth = np.where(np.asarray(labels) == "A", p, 1 - np.asarray(p))
    sure, right = np.maximum(p_truth, 1 - p_truth), (np.sign(p_truth - 0.5) + 1) / 2
    bins = np.minimum((2 * sure - 1) * BINS, BINS - 1).astype(int)
    gaps = [abs((right - sure)[bins == each].sum()) for each in np.unique(bins)]
    half = math.ceil(len(sure) / 2)
    edge = np.sort(sure)[-half]
    above, tied = right[sure > edge], right[sure == edge]  # of those on the edge, their mean fills the half
    covered = (above.sum() + tied.mean() * (half - len(above))) / half
    brier = ((1 - p_truth) ** 2).mean()
    return {"ece": float(sum(gaps) / len(sure)), "brier": float(brier), "covered": float(covered)}


def fit_calibrator(rows: Iterable[JsonRow]) -> JsonRow:
    """Isotonic regression of the truth on p_a, the same for both letters: f(1 - p) = 1 - f(p).

    judge.py interpolates between the blocks: each one's mean p, and its observed frequency, which stays
    at least 1 / (pairs + 2) away from 0 and 1: no number of pairs makes a judge certain.
    """
    rows = [row for row in rows if "error" not in row and row["pair"].get("label") and row["p_a"] is not None]
    rows = [row for row in rows if not nothing_read(row["votes"])]
    if len(rows) < FEWEST:
        raise InputError(f"{len(rows)} judged pairs with a label; a calibrator needs {FEWEST} or more")
    votes = {
        sum(row["votes"].values()) for row in rows if row.get("details") or not sum(row["votes"].values())
    }
    votes -= {0} if len(votes) > 1 else set()  # identical responses have none
    alike = {json.dumps(_settings(row) | {"seed": 0}, sort_keys=True) for row in rows}
    if len(votes) > 1 or len(alike) > 1 or _settings(rows[0]).get("calibrated"):
        raise InputError(
            "a calibrator needs pairs judged alike: by one judge and number of votes, not calibrated yet"
        )
    points = [(row["p_a"], row["pair"]["label"] == "A") for row in rows]
    points += [(1 - p, not truth) for p, truth in points]
    points.sort(key=lambda point: (point[0], -point[1]))  # of equal p the true first: they pool
    blocks: list[list[float]] = []  # truths, sum of p, count
    for p, truth in points:
        blocks.append([truth, p, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][2] >= blocks[-1][0] * blocks[-2][2]:
            last = blocks.pop()
            blocks[-1] = [one + two for one, two in zip(blocks[-1], last, strict=True)]
    least, judge = 1 / (len(rows) + 2), _settings(rows[0])
    return {
        "votes": votes.pop(),
        "greedy": not judge.get("temperature"),
        "drawn": [judge.get("temperature", 1.0), judge.get("top_p", 1.0), judge.get("top_k", 0)],
        "pairs": len(rows),
        "p": [total / count for _, total, count in blocks],
        "calibrated": [min(max(truths / count, least), 1 - least) for truths, _, count in blocks],
    }


def calibrate(path: Path, directory: Path) -> tuple[Path, JsonRow]:
    """Fits on a judged file and leaves the map in the model's directory, whole or not at all."""
    from gramr2.judge import CALIBRATION  # brings torch, which a table does not need
    from gramr2.weights import fingerprint

    if not model_file(directory, "config.json").is_file():
        raise InputError(f"{directory}: not a model directory (it has no config.json)")
    rows = Store(path, partial(_checked, "pairs"))
    fitted = fit_calibrator(rows)
    judge = next(Fields(_settings(row), f"{path}: judge: ") for row in rows if "error" not in row)
    weights, prompt = judge.get("weights", str, ""), judge.get("prompt", str, "")
    if weights != fingerprint(directory):
        by = judge.get("model", str, "another judge")
        raise InputError(f"{path}: judged by {by}, with other weights than those of {directory}")
    write_json(directory / CALIBRATION, fitted | {"judge": f"{weights} {prompt}"})
    return directory / CALIBRATION, fitted


# ---------------------------------------------------------------------------------- the table


def score(name: str, paths: Sequence[Path]) -> JsonRow:
    """A benchmark's result from judged files, ours or JudgeBench's own."""
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark {name}; there are {', '.join(BENCHMARKS)}")
    return score_rows(name, read_judged(name, paths), paths[0])


def score_rows(name: str, rows: list[JsonRow], where: Path) -> JsonRow:
    """A benchmark's result from rows that were read from `where`."""
    try:
        averages, text = BENCHMARKS[name](rows)
        judges = judges_of(rows)
        compared = [each for row in rows for each in row.get("comparisons", ())] if name == "ppe" else rows
        figures = reliability(compared)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{where}: not rows of {name} ({error!r})") from None
    figures["failed"] = sum("error" in row for row in rows)
    return {"benchmark": name, "judges": judges, "averages": averages, **figures, "more": text}


def read_judged(name: str, paths: Sequence[Path]) -> list[JsonRow]:
    """The rows of judged files, each with what its benchmark's figures need."""
    rows = [row for path in paths for row in Store(path, partial(_checked, name))]
    need(len(rows) > 0, f"{paths[0]}: no judged rows")
    return rows


def _checked(name: str, row: JsonRow) -> JsonRow:
    try:
        return _read(name, row)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"not a judged row ({error!r})") from None


def _read(name: str, row: JsonRow) -> JsonRow:
    fields = Fields(row)
    if "judgments" in row:
        return _published(row)
    if not isinstance(row.get("judge", ""), (str, dict)):
        raise InputError('field "judge" is neither a name nor what it judged with')
    if name == "ppe":
        scores = fields.get("scores", tuple[float, ...])
        for each in row.get("comparisons", ()):  # which of two is better is known where their scores differ
            duel = Fields(each, "comparisons: ")
            a, b = (scores[duel.get(side, int, low=0, high=len(scores) - 1)] for side in "ab")
            duel.get("p", float, low=0, high=1)
            Judgment.from_json({key: each[key] for key in each if key not in ("a", "b", "p")})
            each["pair"] = {"label": "A" if a > b else "B"}
            each["p_a"] = each["p_a"] if a != b else None
        return row
    pair = Pair.from_json(fields.get("pair", dict))
    if name == "audit":
        for field in ("audit", "of"):
            Fields(pair.meta, "not of an audit: meta: ").get(field, str)
        need(isinstance(row.get("judge"), dict), "not of an audit: it does not say what judged it")
    need(pair.label is not None or name == "audit", "its pair has no label")
    for place in ("chosen", "rejected") if name == "rm-bench" else ():
        Fields(pair.meta, "meta: ").get(place, int, low=0, high=2)
    if "error" not in row:
        Judgment.from_row(row)
    orders = {vote["order"] for vote in row.get("details", ())}
    if name in BOTH_ORDERS and orders == {"AB"} and not nothing_read(row["votes"]):
        raise InputError("judged in one order; the benchmark's rule needs both (--bench asks for both)")
    return row


def _settings(row: JsonRow) -> JsonRow:
    """What a row was judged with; a published one says a name instead."""
    judge = row.get("judge")
    return {k: v for k, v in judge.items() if k not in TOLD} if isinstance(judge, dict) else {}


def judges_of(rows: Iterable[JsonRow]) -> list[str]:
    return sorted({_judge(row) for row in rows if row.get("judge")})


def _judge(row: JsonRow) -> str:
    parts = {name: f"{name} {value}" for name, value in _settings(row).items() if value is not None}
    if parts and row["judge"]["votes"] > 1:
        parts["votes"] += f" ({row['judge']['votes'] // 2} in each order)"
    return ", ".join(parts.values()) or row["judge"]


FIGURES = (
    ("orders agree", "consistency", ".1%"),
    ("unreadable votes", "abstention", ".1%"),
    ("pairs that could not be judged", "failed", "d"),
    ("pairs without a readable vote", "unread", "d"),
    ("pairs that hold a line of the prompt's own", "forged", "d"),
    ("ECE", "ece", ".3f"),
    ("Brier score", "brier", ".3f"),
    ("accuracy at 50% coverage", "covered", ".1%"),
    ("tokens per judgment", "tokens", ",.0f"),
)


def readable(result: JsonRow) -> str:
    lines = [f"{result['benchmark']}, judged by {'; '.join(result['judges']) or 'unknown'}", ""]
    lines.append(f"{'':44}     %   95% interval      n")
    for each in result["averages"]:
        span = f"{each['low']:5.1f} – {each['high']:5.1f}"
        lines.append(f"{each['name']:44} {each['value']:5.1f}   {span} {each['n']:6}")
    lines += ["", *([result["more"], ""] if result["more"] else [])]
    for name, key, form in FIGURES:
        value = result.get(key)
        lines.append(f"{name:44} {'–' if value is None else format(value, form)}")
    calibrated = "calibrated" if result["calibrated"] else "as judged, not calibrated"
    return "\n".join([*lines, f"{'probabilities':44} {calibrated}"])
