"""The leaderboard: each board by its own rules, and judges compared on the items that both have judged."""

import json
import random
from pathlib import Path

import pytest

from gramr2.extras import board, evaluate, report
from gramr2.files import InputError, exit_status

DOMAINS = {"knowledge": 90, "reasoning": 60, "math": 30, "coding": 20}


def judged_file(path: Path, model: str, right, source="judgebench", **more) -> Path:
    """A judged file of pairs in four domains of different sizes; `right` says which of them are."""
    rows = []
    places = [(domain, n) for domain, count in DOMAINS.items() for n in range(count)]
    for place, (domain, n) in enumerate(places):
        if (hit := right(place)) is None:  # this judge was not asked
            continue
        label = "A" if hit else "B"
        pair = {"id": f"{domain} {n}", "question": "q", "response_a": "x", "response_b": "y", "label": "A"}
        votes = [{"label": label, "order": order, "p_a": 0.9 if hit else 0.1} for order in ("AB", "BA")]
        counts = {"A": 0, "B": 0, "none": 0} | {label: 2}
        judge = {"model": model, "format": "think", "votes": 2, "seed": 0} | more
        pair |= {"domain": domain, "source": source}
        row = {"id": pair["id"], "pair": pair, "label": label, "p_a": votes[0]["p_a"], "votes": counts}
        rows.append(row | {"details": votes, "judge": judge})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def boards_of(paths) -> dict[str, dict]:
    """What the page of some files is given, by board."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "write_page", lambda out, template, **shown: given.update(shown))
        board.write_board(paths, Path("board.html"))
    named = given["names"]
    return {
        each["name"]: {named[judge].partition(". ")[2]: found for judge, found in each["results"].items()}
        for each in given["boards"]
    }


def test_judges_are_compared_item_by_item_by_the_boards_own_rule(tmp_path):
    """Of two judges that err together a difference is seen that their intervals alone would hide; what only
    one of them has judged is left out of it."""
    hard = [random.Random(place).random() for place in range(sum(DOMAINS.values()))]
    first = judged_file(tmp_path / "first.jsonl", "models/first", lambda k: hard[k] < 0.7)
    better = judged_file(
        tmp_path / "b.jsonl", "models/b", lambda k: None if k < 40 else hard[k] < 0.78, seed=1
    )
    alone = judged_file(tmp_path / "alone.jsonl", "models/first", lambda k: None if k < 40 else hard[k] < 0.7)
    found = boards_of([first, better])["judgebench"]
    assert list(found) == ["b", "first"]  # the best first
    for name, path in (("first", first), ("b", better)):
        assert found[name]["averages"] == evaluate.score("judgebench", [path])["averages"]
    less, (a, b) = found["b"]["less"], [evaluate.score("judgebench", [path]) for path in (better, alone)]
    assert found["first"]["less"] is None and less["items"] == 160
    for mine, theirs in zip(a["averages"], b["averages"], strict=True):
        between = less["by"][mine["name"]]
        assert between["value"] == pytest.approx(mine["value"] - theirs["value"], abs=0.02)
    whole = less["by"]["mean of the four categories (the paper's Overall)"]
    assert whole["low"] > 0 and found["b"]["head"]["low"] < found["first"]["head"]["high"]
    widths = [each["high"] - each["low"] for each in (whole, found["b"]["head"])]
    assert widths[0] < widths[1]


def test_files_of_one_judge_are_a_row_and_other_settings_another(tmp_path):
    def half(part: int) -> Path:
        right = lambda k: k % 3 > 0 if k % 2 == part else None  # noqa: E731
        return judged_file(tmp_path / f"{part}.jsonl", "runs/a/model", right, code=f"version {part}")

    votes = judged_file(tmp_path / "votes.jsonl", "runs/a/model", lambda k: True, votes=8)
    own = judged_file(tmp_path / "own.jsonl", "runs/b/model", lambda k: True, source="mine")
    found = boards_of([half(0), half(1), votes, own])
    assert list(found["judgebench"]) == ["a (votes 8 (4 in each order))", "a (votes 2 (1 in each order))"]
    assert found["judgebench"]["a (votes 2 (1 in each order))"]["averages"][-1]["n"] == 200
    assert list(found["mine"]) == ["b"]


def test_what_a_leaderboard_cannot_be_made_of_is_one_line(tmp_path, capsys):
    one, two = (judged_file(tmp_path / name, name, lambda k: True) for name in ("one", "two"))
    both = tmp_path / "both"
    both.write_text(one.read_text() + two.read_text())
    with pytest.raises(InputError, match="both: its rows name 2 judges"):
        board.read_file(both)
    audit = tmp_path / "audit"
    audit.write_text(one.read_text().replace('"domain"', '"meta": {"audit": "style", "of": "x"}, "domain"'))
    with pytest.raises(InputError, match="of an audit"):
        board.read_file(audit)
    before = one.read_text()
    for words, said in [
        ([], "give the directory of a run, or --board"),
        ([tmp_path, "--board", one], "give the directory of a run, or --board"),
        ([tmp_path, "--out", one], "--out goes with --board"),
        (["--board", one, "--out", one], "is a judged file"),
        (["--board", tmp_path / "nowhere", "--out", one], "nowhere: No such file"),
    ]:
        assert exit_status(report.main, list(map(str, words))) == 2 and said in capsys.readouterr().err
    assert one.read_text() == before
