"""Draws a judged row's votes again, and says whether they are the same: `infer.py --replay FILE --item ID`.

The row names all that its votes follow from: weights and prompt by their hashes, format, seed, number of
votes, how they were drawn, and the day that the chat template printed. The model that it names, or --model,
is held to that before anything is drawn; a calibration is not, for it changes no vote. All votes of the item
are drawn, as they were; --vote N compares one of them.

A vote is the same if its text and its verdict are, and its probability to a thousandth. The same code on the
same kind of device draws the same texts. Elsewhere the last bits of a logit differ, and may turn a token that
was as likely as another one: what differs in code and device is then said as well.

It leaves out: rows of an endpoint, of which nobody knows the weights; and lists, whose rows hold no texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gramr2.extras.bulk import NEUTRAL, Judge, JudgeSettings, differences, judged_rows
from gramr2.extras.evaluate import TOLD
from gramr2.fields import REQUIRED, Fields
from gramr2.files import InputError, JsonRow, need, visible
from gramr2.records import Judgment, Pair
from gramr2.settings import SAMPLING, SEEDS

CLOSE = 1e-3  # that probabilities and scores may differ by
ROW_SAYS = ("votes", "format", "out", "limit", *SAMPLING)  # flags that a row leaves no room for
Side = tuple[str | None, str, list[Any]]  # label, text, probability or scores


def replay_item(given: argparse.Namespace) -> int:
    """The command: prints what was found; its exit status is 0 where all is the same, else 1."""
    need(given.item is not None, "--replay FILE: needs --item ID, the id of one of its rows")
    said = [name for name in ROW_SAYS if getattr(given, name) is not None] + ["seed"] * bool(given.seed)
    need(not said, f"--replay draws as the row says; leave out --{', --'.join(said)}".replace("_", "-"))
    row = find_row(given.replay, given.item)
    where = f"{given.replay}: row {given.item}: "
    judge = load_judge(row, where, given)
    found = compare(row, judge, where, given.vote)
    text = json.dumps(found, ensure_ascii=False, indent=2) if given.json else "\n".join(lines_of(found))
    print(visible(text))
    return 0 if found["same"] else 1


def find_row(path: Path, item: str) -> JsonRow:
    """The row of an item. One that stands there twice has the same votes twice."""
    rows = [row for row in judged_rows(path) if row["id"] == item]
    need(len(rows) > 0, f"{path}: no row has the id {item}")
    row, where = rows[0], f"{path}: row {item}: "
    need("error" not in row, f"{where}could not be judged: {row.get('error')}")
    need("pair" in row, f"{where}of a list, which holds no texts; judge it again with --bench")
    need(all(each.get("pair") == row["pair"] for each in rows), f"{where}two pairs have this id")
    return row


def load_judge(row: JsonRow, where: str, given: argparse.Namespace) -> Judge:
    """The judge that a row names, held to all that the row says of it."""
    said = Fields(row["judge"], f"{where}judge: ")
    place = given.model or said.get("model", str)
    need("://" not in str(place), f"{where}{place} is an endpoint; nothing tells which weights it serves")
    need(said.get("weights", str, "") != "", f"{where}names no weights, which no model can then be held to")
    drawn = {k: said.get(k, x[0], dict(NEUTRAL).get(k, REQUIRED), **x[1]) for k, x in SAMPLING.items()}
    votes, seed = said.get("votes", int, low=1, high=10**4), said.get("seed", int, **SEEDS)
    how = given.prompt, said.get("format", str), given.device, given.dtype, votes, seed
    day = said.get("date", str, None)
    judge = Judge(JudgeSettings(Path(place), *how, greedy=False, drawn=drawn, date=day))
    judge.sign_rows()
    if other := differences(row["judge"], judge.judged_with, (*TOLD, "model", "calibrated")):
        raise InputError(f"{where}was judged with {other}; name its own with --model DIR and --prompt FILE")
    need(
        bool(day) or not judge.prints_date,
        f"{where}does not tell the day that the chat template printed, a part of the prompt",
    )
    return judge


def compare(row: JsonRow, judge: Judge, where: str, number: int | None) -> JsonRow:
    """What the row has, beside what is drawn now."""
    was = Judgment.from_row(row)
    ((_, now),) = judge.model.judge_many([Pair.from_json(row["pair"])], **judge.sampling, progress=False)
    if isinstance(now, InputError):
        raise InputError(f"{where}could not be judged again: {now}")
    asked, drawn = len(was.details), len(now.details)
    need(asked == drawn, f"{where}has {asked} votes, and not the {drawn} that its judge casts")
    need(number is None or 1 <= number <= asked, f"{where}has the votes 1 to {asked}, and no --vote {number}")
    found = []
    for place, (a, b) in enumerate(zip(was.details, now.details, strict=True), 1):
        name = f"vote {place} ({b.order}, seed {b.seed})"
        found.append(beside(name, (a.label, a.text, [a.p_a]), (b.label, b.text, [b.p_a])))
    mapped = row["judge"].get("calibrated") != judge.judged_with["calibrated"]  # by another map than now
    is_now = now.label, "", [was.p_a if mapped else now.p_a, *now.scores]
    found.append(beside("verdict", (was.label, "", [was.p_a, *was.scores]), is_now))
    found = found if number is None else found[number - 1 : number]
    then, here = ({name: said.get(name) for name in TOLD[:2]} for said in (row["judge"], judge.judged_with))
    same, note = all(each["same"] for each in found), differences(then, here, ())
    return {"item": row["id"], "same": same, "drawn": found, "note": note}


def beside(name: str, was: Side, now: Side) -> JsonRow:
    """A vote or a verdict as it was and as it is."""
    parts = next((k for k, (a, b) in enumerate(zip_longest(was[1], now[1])) if a != b), None)
    near = (a == b or (None not in (a, b) and abs(a - b) < CLOSE) for a, b in zip_longest(was[2], now[2]))
    same = was[0] == now[0] and parts is None and all(near)
    found = {"name": name, "same": same, "was": was[0], "now": now[0], "texts_part_at": parts}
    return found | {"figures": [was[2], now[2]]}


def lines_of(found: JsonRow) -> Iterator[str]:
    for each in found["drawn"]:
        line = f"{each['name']}: {'the same' if each['same'] else 'different'}, {each['now'] or 'none'}"
        line += "" if each["same"] else f"; was {each['was'] or 'none'}; figures {each['figures']}"
        parts = each["texts_part_at"]
        yield line if parts is None else f"{line}; the texts part at character {parts}"
    if found["note"]:
        yield f"note: it was judged with {found['note']}"
