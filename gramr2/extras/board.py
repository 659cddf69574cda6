"""board.html: a leaderboard of judges from their judged files, in one file that asks nothing of the network.

    python -m gramr2.extras.report --board a.jsonl b.jsonl … --out board.html

A file is of the board that its pairs come from (`source`), and is scored by that board's own rules, as by
--score; other pairs are a board by their source. It is of one judge; several files of one judge, with the
same settings, are one row of the page.

Two judges are compared on the items that both have judged, item by item: their luck with the items is then
the same for both. Each is scored on those alone, and the interval is that of the mean difference, drawn anew
within the groups of each average. What all are compared with is the judge that was named first, and not the
best one: who is best, is so by luck as well.

It leaves out: judging (bulk.py), and the rules (evaluate.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gramr2.data import Store
from gramr2.extras.evaluate import BENCHMARKS, FIGURES, judges_of, read_judged, score_rows
from gramr2.extras.page import write_page
from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, need, short_hash

TEXTS = ("text", "rationale", "question", "messages", "response_a", "response_b")  # that no rule reads
ITEM = ("response_a", "response_b", "label", "scores")  # beside its id, what makes an item the same


def source_of(row: JsonRow) -> str:
    """Where a judged row's item comes from; a list, and a published judgment, are of one board each."""
    if "pair" not in row:
        return "judgebench" if "judgments" in row else "ppe"
    pair = Fields(row).object("pair")
    need("audit" not in pair.object("meta").row, "of an audit, which infer.py --score audit reads")
    return pair.get("source", str, "")


def slim(value: Any) -> Any:
    """Rows without their texts, which would fill the memory."""
    if isinstance(value, dict):
        return {name: slim(each) for name, each in value.items() if name not in TEXTS}
    return list(map(slim, value)) if isinstance(value, list) else value


def read_file(path: Path) -> tuple[str, str, list[JsonRow]]:
    """(board, judge, rows) of a judged file; each row with what tells its item from others."""
    name = ", ".join(sorted({*Store(path, source_of)} - {""})) or "pairs"
    rows = read_judged(name if name in BENCHMARKS else "pairs", [path])
    judges = judges_of(rows)
    need(len(judges) == 1, f"{path}: its rows name {len(judges)} judges; give files of one judge each")
    for row in rows:
        item = [row["id"], *map((row.get("pair") or row).get, ITEM)]
        row["item"] = short_hash(repr(item).encode())
    return name, judges[0], slim(rows)


def names_of(judges: Iterable[str]) -> dict[str, str]:
    """Each judge's number and its model's own name; and, of several with that name, what tells it apart."""
    short = {each: re.sub("^model |(/model)?, format .*", "", each).rpartition("/")[2] for each in judges}
    names = {}
    for number, judge in enumerate(short, 1):
        alike = [other.split(", ") for other in short if short[other] == short[judge]]
        apart = [part for part in judge.split(", ") if not all(part in other for other in alike)]
        names[judge] = f"{number}. {short[judge]}" + f" ({', '.join(apart)})" * bool(apart)
    return names


def headline(averages: Sequence[JsonRow]) -> JsonRow:
    """A board's one figure: the last of its means of groups, where it has such."""
    return [*averages[-1:], *(each for each in averages if each["name"].startswith("mean of"))][-1]


def differences(rule: str, ours: list[JsonRow], first: list[JsonRow]) -> JsonRow:
    """By what a judge is better than the first one, average by average, on the items of both."""
    by_item = [{row["item"]: row for row in rows} for rows in (ours, first)]
    both = [item for item in by_item[1] if item in by_item[0]]
    try:
        scored = (score_rows(rule, [rows[each] for each in both], Path(rule)) for rows in by_item)
        mine, theirs = (each["averages"] for each in scored)
        by = {a["name"]: a.less(b) for a, b in zip(mine, theirs, strict=True) if a["name"] == b["name"]}
    except (InputError, ValueError):  # no item, or no prompt with all of its pairs
        return {"items": len(both), "by": {}}
    alike = len(by) == len(mine)  # else scores and verdicts go by other rules
    return {"items": len(both), "by": by if alike else {}}


def board(name: str, judged: dict[str, list[JsonRow]]) -> JsonRow:
    """What a board's tables hold, the best judge first."""
    rule, first, results = name if name in BENCHMARKS else "pairs", next(iter(judged)), {}
    for judge, rows in judged.items():
        found = results[judge] = score_rows(rule, rows, Path(name))
        found["head"], found["by"] = headline(found["averages"]), {x["name"]: x for x in found["averages"]}
        found["less"] = differences(rule, rows, judged[first]) if judge != first else None
    ranked = sorted(results, key=lambda judge: -results[judge]["head"]["value"])
    return {"name": name, "first": first, "results": {judge: results[judge] for judge in ranked}}


def write_board(paths: Sequence[Path], out: Path) -> Path:
    """Makes the page of some judged files."""
    boards: dict[str, dict[str, list[JsonRow]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        name, judge, rows = read_file(path)
        need(not (out.exists() and out.samefile(path)), f"{out}: is a judged file; give another --out")
        boards[name][judge] += rows
    names = names_of(dict.fromkeys(judge for judged in boards.values() for judge in judged))
    made = [board(*each) for each in boards.items()]
    write_page(out, "board.html", boards=made, names=names, figures=FIGURES)
    return out
