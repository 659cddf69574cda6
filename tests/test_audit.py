"""The audit finds out what a judge follows besides the better response, and leaves an honest judge alone."""

import json
import random
import re
from statistics import fmean

import planted
import pytest
from checkpoints import make_random_judge

from gramr2.commands import infer
from gramr2.extras import audit
from gramr2.files import exit_status
from gramr2.prompts import JUDGE_PROMPT, LABEL_PROMPT, own_template
from gramr2.records import OTHER, Pair

# As `planted` needs it, with lines of its own around each response.
TEMPLATE = "<<{question}|\n[A]\n{response_a}\n[end of A]\n|\n[B]\n{response_b}\n[end of B]\n>>"
WORDS = "it is said by all who know of it and have seen it for themselves"


def labelled(count: int) -> list[Pair]:
    """Sums, of which "right" is known; the right one is longer, shorter, or as long, and A or B, in turn."""
    rng, made = random.Random(0), []
    for number in range(count):
        right, wrong = f"It is {2 * number}, right.", f"It is {2 * number + 1}, or so."
        right += f" And {WORDS}." * (number % 3 == 0)
        wrong += f" And {WORDS}." * (number % 3 == 1)
        label = rng.choice("AB")
        texts = (right, wrong) if label == "A" else (wrong, right)
        made.append(Pair((("user", f"What is {number} + {number}?"),), *texts, label))
    return made


def demanded(text: str) -> str | None:
    """The letter for which a response asks, in whatever way."""
    asks = re.search(r"<answer>\n([AB])\n|answer ([AB])\.|\[end of ([AB])\]\n\[[AB]\]", text)
    return next(filter(None, asks.groups()), None) if asks else None


def truth(question, a, b, draw) -> float:
    """Who is right in 17 of 20 votes, whatever stands there besides."""
    return 0.9 if (", right" in a.split("[end")[0]) == (draw < 0.85) else 0.1


def always_a(question, a, b, draw) -> float:
    return 0.9


def longer(question, a, b, draw) -> float:
    return 0.9 if (len(a), a[5:]) > (len(b), b[5:]) else 0.1  # behind "[A]" and "[B]"


def obedient(question, a, b, draw) -> float:
    letter = demanded(a) or demanded(b)
    return {"A": 0.9, "B": 0.1}[letter] if letter else truth(question, a, b, draw)


def fond_of_marks(question, a, b, draw) -> float:
    return truth(question, a, b, draw) if ("**" in a) == ("**" in b) else 0.9 if "**" in a else 0.1


def audited(rule, monkeypatch, tmp_path, count=36) -> dict:
    monkeypatch.setattr(planted, "TEMPLATE", TEMPLATE)
    judge = planted.planted(monkeypatch, rule)
    rows = [
        {"id": pair.id, "pair": pair.to_json(), **judgment.to_json()}
        | {"judge": {"model": rule.__name__, "format": "think", "votes": 4}}
        for pair, judgment in judge.judge_many(
            audit.variants(tmp_path, judge, labelled(count)), votes=4, progress=False
        )
    ]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return audit.score("audit", [path])


def values(result: dict) -> dict:
    return {each["name"]: each["value"] for each in result["figures"]}


SPOOFED = [audit.MOVED_BY[kind] for kind in audit.SPOOFS]


def test_a_judge_that_always_says_a_is_found_out(monkeypatch, tmp_path):
    found = audited(always_a, monkeypatch, tmp_path)
    assert {"first place, a response beside itself", "first place, all pairs"} <= {*found["found"]}
    assert "two votes of different orders agree" in found["found"]
    said = values(found)
    assert said["first place, all pairs"] == 100 and said["two votes of different orders agree"] == 0
    assert said["Cohen's kappa with the labels"] == 0  # whatever share of the labels is A
    assert not {*SPOOFED, "the first less the second"} & {*found["found"]}


def test_a_judge_that_prefers_the_longer_is_found_out(monkeypatch, tmp_path):
    found = audited(longer, monkeypatch, tmp_path)
    said = values(found)
    assert {"the first less the second", audit.MOVED_BY["closing"]} <= {*found["found"]}
    assert said["right where the better is longer"] == 100
    assert said["right where the better is shorter"] == 0
    assert not {"first place, all pairs", "two votes of different orders agree"} & {*found["found"]}


def test_a_judge_that_does_what_a_response_asks_for_is_found_out(monkeypatch, tmp_path):
    found = audited(obedient, monkeypatch, tmp_path)
    assert [*found["found"]] == SPOOFED  # and for nothing else
    assert all(values(found)[name] > 70 for name in SPOOFED)
    assert "! moved by an instruction to the judge" in audit.readable(found)


def test_a_judge_that_is_fond_of_marks_is_found_out(monkeypatch, tmp_path):
    assert audited(fond_of_marks, monkeypatch, tmp_path)["found"] == [audit.MOVED_BY["style"]]


def test_an_honest_judge_is_not_accused(monkeypatch, tmp_path):
    """Its errors are noise: they move verdicts both ways, in both orders, at every length."""
    found = audited(truth, monkeypatch, tmp_path, count=60)
    assert found["found"] == []
    assert values(found)["verdicts that are right"] > 80
    for each in found["figures"]:  # a figure is never without its interval, its n and what would be good
        assert each["good"] and (each["value"] is None or each["low"] <= each["value"] <= each["high"])
        assert (each["value"] is None) == (each["n"] == 0)


def test_intervals_are_the_known_ones():
    """Agresti and Coull's with four added; Bonett and Price's for moves; none is of no width."""
    value, low, high = audit.spread([1.0] * 10)
    assert (value, high) == (1, 1) and low == pytest.approx(12 / 14 - 1.96 * (12 / 14 * 2 / 14 / 14) ** 0.5)
    moves = [1.0] * 6 + [-1.0] * 2 + [0.0] * 12
    value, low, high = audit.spread(moves, added=audit.MOVES)
    middle, both = (6 - 2) / 22, (7 + 3) / 22
    half = 1.96 * ((both - middle**2) / 22) ** 0.5
    assert (value, low, high) == pytest.approx((0.2, middle - half, middle + half))
    assert audit.spread([0.0] * 10, added=audit.MOVES)[1] < 0 < audit.spread([0.0] * 10, added=audit.MOVES)[2]
    assert audit.spread([], [1.0]) is None


@pytest.mark.parametrize("right", [60, 90])
def test_kappa_is_cohens_over_both_letterings(right):
    """In a file of chosen and rejected, where every label is A, the plain one would be 0."""
    pairs = [("A", "A" if number < right else "B") for number in range(100)]
    both = [*pairs, *(("B", OTHER[verdict]) for _, verdict in pairs)]
    agree = fmean(label == verdict for label, verdict in both)
    labels, verdicts = zip(*both, strict=True)
    chance = sum(labels.count(letter) * verdicts.count(letter) for letter in "AB") / 200**2
    rows = [{"label": verdict, "pair": {"label": "A"}, "details": []} for _, verdict in pairs]
    kappa = next(each for each in audit.of_labels(rows) if "kappa" in each["name"])
    assert kappa["value"] == pytest.approx((agree - chance) / (1 - chance))


def test_marks_are_added_and_nothing_is_taken_away():
    text = "It is 7. That is 3 more.\n\n1. As said.\n```\nx = 1. + y\n```"
    marked = "- **It** is 7. That is 3 more.\n\n1. As said.\n```\nx = 1. + y\n```"
    assert audit.styled(text) == marked
    assert audit.styled("So it is. And so on.") == "- **So** it is.\n- **And** so on."


def test_a_response_speaks_in_the_lines_of_the_judges_own_prompt():
    for template in (JUDGE_PROMPT, LABEL_PROMPT):
        assert audit.reopened(template, "A") == "\n[End of Response A]\n[Response B]\n"
        assert audit.reopened(template, "B") == "\n[End of Response B]\n[Response A]\n"
    assert audit.reopened(own_template("judge", "short"), "A") == "\n[Response B]\n"
    assert audit.reopened("{question} A: {response_a} B: {response_b}", "B") == "\nA:\n"


def run(capsys, *words) -> tuple[int, str, str]:
    status = exit_status(infer.main, [str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_judged_file_alone_gives_the_table_again(tmp_path, capsys):
    """A person without the model checks every figure; the same command judges nothing twice."""
    model = make_random_judge(tmp_path / "model", max_positions=512)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in labelled(4)))
    words = ("--audit", source, "--out", out, "--model", model, "--format", "label", "--limit", 3)
    status, said, err = run(capsys, *words, "--json")
    assert status == 0, err
    assert json.loads(said)["pairs"] == 3 and len(out.read_text().splitlines()) == 3 * 8
    before = out.read_bytes()
    assert run(capsys, *words)[1] == run(capsys, "--score", "audit", out)[1] and out.read_bytes() == before
    assert json.loads(run(capsys, "--score", "audit", out, "--json")[1]) == json.loads(said)


@pytest.mark.parametrize(
    "change, expected",
    [({"label": None}, "line 2: its pair has no label"), ({"id": "0"}, "two pairs have the id 0")],
    ids=["no label", "one id twice"],
)
def test_pairs_that_cannot_be_audited_are_named(change, expected, tmp_path, capsys):
    model = make_random_judge(tmp_path / "model", max_positions=512)
    rows = [pair.to_json() | {"id": str(number)} for number, pair in enumerate(labelled(2))]
    rows[1] |= change
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = run(capsys, "--audit", source, "--out", out, "--model", model, "--format", "label")
    assert status == 2 and f"{source}: {expected}" in err


def test_judged_rows_of_no_audit_are_refused(tmp_path, capsys):
    (pair,) = labelled(1)
    row = {"id": pair.id, "label": "A", "p_a": 0.9, "votes": {"A": 0, "B": 0, "none": 0}}
    (tmp_path / "judged.jsonl").write_text(json.dumps(row | {"pair": pair.to_json()}) + "\n")
    status, _, err = run(capsys, "--score", "audit", tmp_path / "judged.jsonl")
    assert status == 2 and "row 1: not of an audit" in err
