"""report.html: what a self-training run did, in one file that asks nothing of the network.

    python -m gramr2.extras.report runs/toy        writes a run's report again
    python -m gramr2.extras.report --board a.jsonl b.jsonl --out board.html     a leaderboard (board.py)

A run writes it when it begins, as it goes on (progress.py), and when it ends. It is made from the run's
directory (plan.json, steps/, results.json), so a run that was interrupted can have one too: it says what is
missing. Here the figures are made; the page that shows them is the template report.html beside this file,
with its style in report.css; report.js filters its examples and draws its curves.

Responses and rationales are text that somebody else wrote, and the page takes them for text (page.py). Long
ones are shortened in the page, and their length is said; the run's files keep them whole.

It leaves out: anything that would need a model. The truth is read here for reporting only.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is imported, or a package be missing
    from gramr2.interrupts import end_in_one_line

    end_in_one_line()

import contextlib
import heapq
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from gramr2 import denoise
from gramr2.extras import audit
from gramr2.extras.board import write_board
from gramr2.extras.evaluate import score_leanings
from gramr2.extras.page import Strip, write_page
from gramr2.extras.results import FUNNEL, JudgedPair, RunReader, accuracy_rows, gain_in_words, read_round
from gramr2.extras.toyworld import world_rules
from gramr2.files import InputError, JsonRow, Parser, need, only_writer, parse_json, run_command
from gramr2.records import UNDECIDED, Judgment, Pair
from gramr2.settings import SelfTrainSettings
from gramr2.stages import STAGES

EXAMPLES = 200  # pairs in a report
FEW = 20  # in one that a run writes as it goes on, which is to cost little
POINTS = 100  # of a training's curve
SHOWN_AS = {"wellformed": "well-formed"}  # a stage of the funnel, in words

# ---------------------------------------------------------------------------------- the figures


def accuracy(run: RunReader) -> JsonRow:
    """Accuracy on the held-out pairs, by model; from the tests' files where there are no results yet."""
    rows = run.results.get("rows") or accuracy_rows(run, run.steps)
    strips = []
    for row in rows:
        kind = "ours" if row["name"].startswith(("round", "fine", "voting")) else "other"
        value, low, high = (row[name] for name in ("accuracy", "low", "high"))
        note = f"{value:.1f} ({low:.1f} – {high:.1f})"
        strips.append(Strip(row["name"], note, dots=[(value, low, high, kind)]))
    domains = sorted({name for row in rows for name in row["by_domain"]})
    cells = [[row["name"], row["n"], *map(row["by_domain"].get, domains)] for row in rows]
    return {"strips": strips, "domains": domains, "rows": cells}


def curves(run: RunReader) -> Iterator[JsonRow]:
    """Loss and learning rate of each training, also of one that is going on, for the page to draw."""
    for name, path in run.paths.items():
        metrics = path / "metrics.jsonl"
        # The last row may be half written.
        whole = metrics.read_bytes().rpartition(b"\n")[0].splitlines() if metrics.is_file() else []
        rows = [row for row in map(parse_json, whole) if row["loss"] is not None]
        if rows:
            size = math.ceil(len(rows) / POINTS)
            groups = [rows[start : start + size] for start in range(0, len(rows), size)]
            loss, rate = ([fmean(row[key] for row in group) for group in groups] for key in ("loss", "lr"))
            last = {"step": rows[-1]["step"], "seconds": sum(row["seconds"] for row in rows)}
            yield {"name": name, "done": name in run.steps, "loss": loss, "lr": rate, **last}


def funnel(run: RunReader, number: int, pairs: list[JudgedPair]) -> JsonRow:
    """A round's stages and filters and, where the truth is known, how many labels are right."""
    strips, came, whole = [], run.passed(number), max(1, len(pairs))
    for stage, name in enumerate(FUNNEL[:came], 1):
        there = [pair for pair in pairs if pair.reached >= stage]
        hits = [pair.right for pair in there if pair.right is not None]
        good, end = 100 * sum(hits) / whole, 100 * len(there) / whole
        bars = [(0, good, "good"), (good, end, "bad")] if hits else [(0, end, "good")]
        truth = f" · {100 * fmean(hits):.1f}% right" if hits else ""
        strips.append(Strip(SHOWN_AS.get(name, name), f"{len(there):,} ({end:.1f}%){truth}", bars))
    dropped = [pair for pair in pairs if pair.reached < came]
    first = Counter(pair.outcome for pair in dropped)
    wrong = Counter(pair.outcome for pair in dropped if pair.right is False)
    steps = [run.done(f"round-{number}-{step}")["counts"] for step in ("labels", "rationales")]
    alone = {name: count for counts in steps for name, count in counts.get("alone", {}).items()}
    told = any(pair.truth for pair in pairs)
    rows = [(name, first[name], wrong[name] if told else None, alone.get(name)) for name in alone | first]
    nothing = came == len(FUNNEL) and not any(pair.reached == came for pair in pairs)
    return {"number": number, "strips": strips, "rows": rows, "nothing": nothing, "pairs": len(pairs)}


def sureness(known: Sequence[tuple[float, str]]) -> list[Strip]:
    """(p_a, true label) of many pairs → how often the judge is right where it is so sure."""
    bins, strips = defaultdict(list), []
    for p, label in known:
        sure, right = max(p, 1 - p), 0.5 if p == UNDECIDED else float((p > 0.5) == (label == "A"))
        bins[round(16 * sure)].append((sure, right))  # votes put it on, or near, a sixteenth
    for _, members in sorted(bins.items()):
        n, (sure, right) = len(members), map(fmean, zip(*members, strict=True))
        middle = (right + 1.92 / n) / (1 + 3.84 / n)  # Wilson's 95% interval
        spread = 1.96 * math.sqrt(right * (1 - right) / n + 0.96 / n**2) / (1 + 3.84 / n)
        expected = 100 * sure - 0.4, 100 * sure + 0.4, "expected"
        dot = 100 * right, 100 * (middle - spread), 100 * (middle + spread), "ours"
        note = f"{100 * right:.1f}% right of {n:,}"
        strips.append(Strip(f"sure {100 * sure:.1f}%", note, [expected], [dot]))
    return strips


def confidence(run: RunReader, pairs: Sequence[JudgedPair]) -> dict[str, list[Strip]]:
    known: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for pair in pairs:
        if pair.truth and pair.p_a is not None:
            known[f"Round {pair.round}: unlabelled pairs"].append((pair.p_a, pair.truth))
    for step in (step for step in run.steps if step.startswith("test-voting")):
        rows = (row for row in run.rows(step, "judged.jsonl") if "error" not in row)
        known[f"{step[5:]}: held-out pairs"] = [(row["p_a"], row["pair"]["label"]) for row in rows]
    return {title: sureness(each) for title, each in known.items() if each}


def audited(run: RunReader) -> list[tuple]:
    """What the last model's votes on the held-out pairs follow, besides the better response."""
    steps = [step for step in run.steps if step.startswith("test-voting")]
    base = [row for step in steps for row in run.rows(step, "judged.jsonl") if "error" not in row]
    rows = []
    for each in audit.of_judged(base) if base else ():
        value, low, high = (
            f"{each[end]:.{3 if each['unit'] == '' else 1}f}" for end in ("value", "low", "high")
        )
        mark = "! " * each["found"]
        rows.append((mark + each["name"], value, f"{low} – {high}", each["n"], each["good"]))
    return rows


def proofs(run: RunReader) -> JsonRow:
    """How equation 5 ranks the k proofs of a pair: the three pairs with the widest range of scores.

    Beside them: of how many pairs the likeliest proof is also the best one, and what the score leans to.
    """
    widest: list[tuple] = []
    pairs = same = 0
    steps = [step for step in run.steps if "prove" in step.split("-")]
    for step in steps:
        for row in run.rows(step, "proofs.jsonl"):
            ranked = [each for each in row.get("candidates", ()) if each["score"] is not None]
            ranked.sort(key=lambda each: -each["score"])
            if len({each["score"] for each in ranked}) > 1:
                likeliest = max(each["logp_given"] for each in ranked)
                pairs, same = pairs + 1, same + (ranked[0]["logp_given"] == likeliest)
                range_ = ranked[0]["score"] - ranked[-1]["score"]
                widest = heapq.nlargest(3, [*widest, (range_, pairs, step, row, ranked)])
    way = run.settings.get("select_by", "equation-5")
    shown = [ranking(way, *each[2:]) for each in widest]
    kept = (row for step in steps for row in run.rows(step, "proofs.jsonl") if row.get("candidates"))
    return {"way": way, "pairs": pairs, "same": same, "shown": shown, "leanings": score_leanings(kept)}


def ranking(way: str, step: str, row: JsonRow, ranked: list[JsonRow]) -> JsonRow:
    """One pair's k proofs, best first, from the worst score to 0; by another score, to the best."""
    best, worst = 0 if way == "equation-5" else ranked[0]["score"], ranked[-1]["score"]
    strips = []
    every = ranked + [each for each in row["candidates"] if each["score"] is None]
    for number, each in enumerate(every, 1):
        chosen = row["chosen"] is not None and each["ids"] == row["chosen"]["ids"]
        name, note, dots = f"proof {number}{', chosen' * chosen}", f"not eligible: {each['ineligible']}", []
        if each["score"] is not None:
            at = 100 * (each["score"] - worst) / (best - worst)
            sums = [each[key] for key in ("logp_given", "logp_blank") if each[key] is not None]
            note = f"{' / '.join(f'{value:.2f}' for value in sums)} → {each['score']:.5f}"
            dots = [(at, at, at, "ours" if chosen else "other")]
        strips.append(Strip(name, note, dots=dots))
    texts = [(strip.name, each["text"]) for strip, each in zip(strips, every, strict=True)]
    pair = Pair.from_json(row["pair"])
    axis = [f"{worst:.5f}", f"{best:.5g}"]
    return {"step": step, "pair": pair, "strips": strips, "texts": texts, "axis": axis}


def signals(run: RunReader, number: int) -> JsonRow:
    """What each signal knew of a round's wrong labels, if that was weighed."""
    found = run.done(f"round-{number}-signals")["counts"]
    kept = [key for each in found.get("signals", {}).values() for key in each if key.startswith("kept")]
    heads = list(dict.fromkeys(kept))
    rows = [
        (name, each["area"], f"{each['low']} – {each['high']}", *(f"{each[key]}%" for key in heads))
        for name, each in found.get("signals", {}).items()
    ]
    return {**found, "heads": [f"{key} wrong" for key in heads], "rows": rows} if rows else {}


# ---------------------------------------------------------------------------------- examples


def pick(pairs: Sequence[JudgedPair]) -> dict[tuple[int, str], JudgedPair]:
    """At most `EXAMPLES` pairs, in turn from each outcome of each round, right and wrong apart."""
    groups = defaultdict(list)
    for pair in (pair for pair in pairs if pair.p_a is not None):
        groups[pair.round, pair.outcome, pair.right].append(pair)
    turns = filter(None, chain(*zip_longest(*groups.values())))
    return {(pair.round, pair.id): pair for pair in islice(turns, EXAMPLES)}


def examples(run: RunReader, wanted: dict[tuple[int, str], JudgedPair]) -> Iterator[tuple]:
    """Of the wanted pairs: what became of them, the votes cast, pair, judgment, and the row of its proofs."""
    for number in run.rounds:
        rows = run.rows(f"round-{number}-prove", "proofs.jsonl")
        proved = {row["pair"]["id"]: row for row in rows if (number, row["pair"]["id"]) in wanted}
        for row in run.rows(f"round-{number}-predict", "judged.jsonl"):
            if found := wanted.get((number, row["id"])):
                yield found, row["votes"], *as_filtered(run, row), proved.get(row["id"])


def as_filtered(run: RunReader, row: JsonRow) -> tuple[Pair, Judgment]:
    """A judged row as the label filters read it: an incoherent vote is none."""
    pair, settings = Pair.from_json(row["pair"]), SelfTrainSettings(without=tuple(run.settings["without"]))
    rules = denoise.COHERENCE | world_rules(run.settings)
    return pair, denoise.without_incoherent_votes(pair, Judgment.from_row(row), rules, settings.filters())


# ---------------------------------------------------------------------------------- the page


def seen_from_without(run: RunReader) -> JsonRow:
    """Where a run without results is, as its directory shows it; of how many steps is not known here."""
    ends = {name: (path / "done.json").stat().st_mtime for name, path in run.steps.items()}
    state, last = "going on", max(ends, key=lambda name: ends[name], default="none")
    with contextlib.suppress(InputError), only_writer(run.root, is_directory=True):
        state = "stopped"
    says, at = f"its last finished step is {last}", ends.get(last, time.time())
    return {"state": state, "says": says, "at": at, "done": len(ends), "steps": 0}


def gaps(run: RunReader, truth: dict[str, str]) -> Iterator[str]:
    """What a reader would look for and not find."""
    if len(run.rounds) < run.settings["iters"]:
        yield f"Rounds judged: {len(run.rounds)} of {run.settings['iters']}."
    if run.rounds and not truth:
        yield "The true labels of the unlabelled pairs are not known: nothing here says which are right."
    if not run.settings["baselines"]:
        yield "It was asked to train no baselines."
    if run.results.get("stopped"):
        yield f"It stopped early: {run.results['stopped']}"


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Nested settings or figures as lines of a table."""
    if isinstance(value, dict):
        return [line for key, each in value.items() for line in flat(each, f"{name} {key}".strip())]
    return [(name, value)]


def shown(run: RunReader, standing: JsonRow | None) -> JsonRow:
    """All that the page fills in."""
    truth = run.truth()
    rounds = {number: read_round(run, number, truth) for number in run.rounds}
    pairs = [pair for each in rounds.values() for pair in each]
    most = FEW if standing and standing["state"] == "going on" else EXAMPLES
    wanted = dict(islice(pick(pairs).items(), most))
    return dict(
        name=run.root.resolve().name,
        root=run.root,
        standing=None if run.results else standing or seen_from_without(run),
        gaps=list(gaps(run, truth)),
        curves=list(curves(run)),
        gains=list(map(gain_in_words, run.results.get("gains", ()))),
        accuracy=accuracy(run),
        rounds=[funnel(run, *each) for each in rounds.items()],
        confidence=confidence(run, pairs),
        audited=audited(run),
        proofs=proofs(run),
        prover=run.results.get("prover"),
        signals={f"round {number}": found for number in run.rounds if (found := signals(run, number))},
        examples=examples(run, wanted),
        every=len(pairs),
        most=most,
        outcomes=sorted({pair.outcome for pair in wanted.values()}),
        settings=flat(run.settings),
        stages=[(name, each.equation) for name, each in STAGES.items() if f"train {name}" in run.settings],
        seconds=[(place.name, round(run.done(step)["seconds"], 1)) for step, place in run.steps.items()],
    )


def write_report(root: str | Path, standing: JsonRow | None = None) -> Path:
    """Makes report.html in a run's directory, from what the run has left there."""
    path = Path(root) / "report.html"
    write_page(path, "report.html", **shown(RunReader(root), standing))
    return path


def main(argv: Sequence[str]) -> int:
    parser = Parser("gramr2.extras.report", description=__doc__)
    parser.add_argument("run", nargs="?", help="the directory of a run, such as runs/toy")
    parser.add_argument(
        "--board", nargs="+", type=Path, metavar="FILE", help="judged files, for a leaderboard"
    )
    parser.add_argument("--out", type=Path, metavar="PAGE", help="where the leaderboard goes [board.html]")
    given = parser.parse_args(argv)
    need((given.run is None) != (given.board is None), "give the directory of a run, or --board FILE …")
    need(
        given.board is not None or given.out is None, "--out goes with --board; a run's report is in the run"
    )
    if given.board:
        print(f"board: {write_board(given.board, given.out or Path('board.html'))}")
    else:
        print(f"report: {write_report(given.run)}")
    return 0


if __name__ == "__main__":
    run_command(main)
