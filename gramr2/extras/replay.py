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
from math import isclose
from pathlib import Path

from gramr2.extras.bulk import NEUTRAL, Judge, JudgeSettings, day_in, differences, judged_rows
from gramr2.extras.evaluate import TOLD
from gramr2.fields import REQUIRED, Fields
from gramr2.files import InputError, JsonRow, need, visible
from gramr2.records import Judgment, Pair, Vote
from gramr2.settings import SAMPLING, SEEDS

CLOSE = 1e-3  # that probabilities and scores may differ by
ROW_SAYS = ("votes", "format", "out", "limit", *SAMPLING)  # flags that a row leaves no room for


def replay_item(given: argparse.Namespace) -> int:
    """The command: prints what was found; its exit status is 0 where all is the same, else 1."""
    need(given.item is not None, "--replay FILE: needs --item ID, the id of one of its rows")
    said = [name for name in ROW_SAYS if getattr(given, name) is not None] + ["seed"] * bool(given.seed)
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in said)
    need(not said, f"--replay: the row says how it was judged; leave out {flags}")
    row = find_row(given.replay, given.item)
    where = f"{given.replay}: row {given.item}: "
    judge = load_judge(row, where, given)
    found = compare(row, judge, where, given.vote)
    print(
        visible(json.dumps(found, ensure_ascii=False, indent=2) if given.json else "\n".join(lines_of(found)))
    )
    return 0 if found["same"] else 1


def find_row(path: Path, item: str) -> JsonRow:
    """The row of an item. One that stands there twice has the same votes twice."""
    need(path.exists(), f"{path}: no such file")
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
    if "://" in str(place):
        raise InputError(f"{where}{place} is an endpoint, and nothing tells which weights it serves")
    need(said.get("weights", str, "") != "", f"{where}names no weights, which no model can then be held to")
    usual = dict(NEUTRAL)
    drawn = {k: said.get(k, each[0], usual.get(k, REQUIRED), **each[1]) for k, each in SAMPLING.items()}
    votes, seed = said.get("votes", int, low=1, high=10**4), said.get("seed", int, **SEEDS)
    how = given.prompt, said.get("format", str), given.device, given.dtype, votes, seed
    judge = Judge(JudgeSettings(Path(place), *how, greedy=False, drawn=drawn, date=day_in(row, where)))
    judge.sign_rows()
    if other := differences(row["judge"], judge.judged_with, (*TOLD, "model", "calibrated")):
        raise InputError(f"{where}was judged with {other}; name its own with --model DIR and --prompt FILE")
    dated = "date" in row["judge"] or not judge.prints_date
    need(dated, f"{where}does not tell the day that the chat template printed, a part of the prompt")
    return judge


def compare(row: JsonRow, judge: Judge, where: str, number: int | None) -> JsonRow:
    """What the row has, beside what is drawn now."""
    was = Judgment.from_row(row)
    known = number is None or 1 <= number <= len(was.details)
    need(known, f"{where}has the votes 1 to {len(was.details)}, and no --vote {number}")
    ((_, now),) = judge.model.judge_many([Pair.from_json(row["pair"])], **judge.sampling, progress=False)
    if isinstance(now, InputError):
        raise InputError(f"{where}could not be judged again: {now}")
    asked, drawn = len(was.details), len(now.details)
    need(asked == drawn, f"{where}has {asked} votes, and not the {drawn} that its judge casts")
    votes = [vote_row(*each) for each in zip(range(1, asked + 1), was.details, now.details, strict=True)]
    votes = votes if number is None else votes[number - 1 : number]
    found: JsonRow = {"item": row["id"], "votes": votes}
    if number is None:
        mapped = row["judge"].get("calibrated") != judge.judged_with["calibrated"]  # by another map
        figures = [(was.p_a, was.p_a if mapped else now.p_a), *zip_longest(was.scores, now.scores)]
        same = was.label == now.label and all(close(*each) for each in figures)
        found["verdict"] = {"same": same, "was": was.label, "now": now.label}
    found["same"] = all(each["same"] for each in [*votes, found.get("verdict", {"same": True})])
    there = {name: {"was": row["judge"].get(name), "now": judge.judged_with[name]} for name in TOLD[:2]}
    return found | {name: each for name, each in there.items() if each["was"] != each["now"]}


def close(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE)


def vote_row(number: int, was: Vote, now: Vote) -> JsonRow:
    parts = next((k for k, (a, b) in enumerate(zip_longest(was.text, now.text)) if a != b), None)
    asked = (was.order, was.seed, was.label) == (now.order, now.seed, now.label)
    same = asked and parts is None and close(was.p_a, now.p_a)
    found = {"vote": number, "order": was.order, "seed": was.seed, "same": same, "was": was.label}
    return found | {"now": now.label, "p_a": [was.p_a, now.p_a], "texts_part_at": parts}


def lines_of(found: JsonRow) -> Iterator[str]:
    for vote in found["votes"]:
        line = f"vote {vote['vote']} ({vote['order']}, seed {vote['seed']}): {_outcome(vote)}"
        line += "" if vote["same"] else "; p(A) was {}, now {}".format(*vote["p_a"])
        parts = vote["texts_part_at"]
        yield line if parts is None else f"{line}; the texts part at character {parts}"
    if "verdict" in found:
        yield f"verdict: {_outcome(found['verdict'])}"
    for name in TOLD[:2]:
        if name in found:
            yield f"note: {name} was {found[name]['was'] or 'not told'}, now {found[name]['now']}"


def _outcome(each: JsonRow) -> str:
    was, now = each["was"] or "none", each["now"] or "none"
    return f"the same, {now}" if each["same"] else f"different, was {was}, now {now}"
