"""Faithfulness: who names a worker's reason is told from who names another pair's, or copies arguments."""

import json
from dataclasses import replace

import pytest
from test_convincing_arguments import archive
from test_house import imported, sources

from gramr2.extras import faithfulness
from gramr2.extras.convincing_arguments import FULL
from gramr2.files import exit_status
from gramr2.prompts import Rationale, proof_from_rationale
from gramr2.records import Pair, Proof

VIRTUES = ("sources", "humour", "grammar", "brevity", "empathy", "statistics", "logic", "history")


def corpus() -> str:
    """Eight pairs of one side; in each, three workers like the first argument for one virtue."""
    xml = "<list>"
    for number, virtue in enumerate(VIRTUES):
        xml += f"<annotatedArgumentPair><id>{number}</id><goldLabel>a1</goldLabel>"
        xml += "<debateMetaData><title>Tea?</title></debateMetaData><mTurkAssignments>"
        for words in (
            f"A1 has {virtue}",
            f"I liked the {virtue} of A1, not A2",
            f"better {virtue}, tea or not",
        ):
            vote = f"<value>a1</value><reason>{words}</reason>"
            xml += f"<mTurkAssignment>{vote}</mTurkAssignment>"
        xml += "</mTurkAssignments>"
        for place in ("arg1", "arg2"):
            text = f"Tea warms {place} in valley number{'x' * number}."
            xml += f"<{place}><stance>yes</stance><text>{text}</text></{place}>"
        xml += "</annotatedArgumentPair>"
    return xml + "</list>"


@pytest.fixture(scope="module")
def reasons(tmp_path_factory):
    return archive(tmp_path_factory.mktemp("ukp") / "ukp.tar.gz", {f"data/{FULL}/tea_yes.xml": corpus()})


def pairs(reasons) -> list[Pair]:
    told = faithfulness.Reference(reasons).told.values()
    return [replace(each.pair, label="A") for each in told]


def rationale(said: str, label: str = "A") -> str:
    other = "B" if label == "A" else "A"
    better = f"Response ⟦{label}⟧ is better than Response ⟦{other}⟧."
    return str(Rationale(f"Response ⟦A⟧ {said}.", f"Response ⟦{label}⟧ is more convincing.", better))


def measured(tmp_path, rows: list[dict], reasons) -> dict:
    path = tmp_path / "proofs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return faithfulness.score([path], reasons)


def level(found: dict, name: str = "the rationales", words: str = "own words") -> dict:
    return next(each for each in found["levels"][words] if each["name"] == name)


def rows_of(reasons, said) -> list[dict]:
    """A row for each pair, in whatever order its responses stand."""
    rows = []
    for number, pair in enumerate(pairs(reasons)):
        row = {"pair": pair.to_json(), "rationale": rationale(said(number, pair))}
        if number % 2:
            row = {"pair": pair.swapped().to_json(), "rationale": rationale(said(number, pair), "B")}
        rows.append(row)
    return rows


def test_the_reason_of_the_pair_counts_and_that_of_another_does_not(reasons, tmp_path):
    right = measured(tmp_path, rows_of(reasons, lambda i, _: f"has {VIRTUES[i]}"), reasons)
    wrong = measured(tmp_path, rows_of(reasons, lambda i, _: f"has {VIRTUES[i - 1]}"), reasons)
    assert level(right)["low"] > 50 and level(right)["n"] == 8
    assert level(wrong)["overlap"] < level(right)["overlap"] / 5 and level(wrong)["high"] <= 0
    workers = level(right, "a worker's reason, against the others'")
    assert workers["low"] > 50  # the reasons themselves agree, and each is held against the others alone


def test_copying_the_arguments_does_not_count(reasons, tmp_path):
    """Reasons repeat words of the arguments ("tea"), so that in all words a copy would have something."""
    found = measured(tmp_path, rows_of(reasons, lambda _, pair: f"says {pair.response_a}"), reasons)
    assert level(found)["overlap"] == 0
    assert level(found, "the better response, copied")["value"] == 0
    assert level(found, "the better response, copied", "all words")["overlap"] > 0


def proof(pair: Pair, said: str, score: float, logp: float, length: int) -> dict:
    text = proof_from_rationale(rationale(said).replace("⟦", "").replace("⟧", ""), "A")
    made = Proof(pair.id, text, logp, score=score, ids=(7,) * length, select_by="equation-5")
    return made.to_json()


def test_a_choice_is_worth_what_it_has_above_the_others(reasons, tmp_path):
    """The score's pick names the reason; the likeliest and the longest do not. Equal proofs differ by 0."""
    rows = rows_of(reasons, lambda i, _: f"has {VIRTUES[i]}")[::2]
    for number, row in enumerate(rows):
        pair, names = Pair.from_json(row["pair"]), f"has {VIRTUES[2 * number]}"
        row["candidates"] = [proof(pair, names, -0.1, -9, 20), proof(pair, "has it", -0.2, -1, 30)]
        row["candidates"].append(Proof(pair.id, "…", -1.0, ineligible="unfinished").to_json())
    found = {each["name"]: each for each in measured(tmp_path, rows, reasons)["choices"]["own words"]}
    gain = found["the likeliest"]["value"]
    assert (
        gain > 50
        and found["the longest"]["value"] == gain
        and found["the best by this measure"]["value"] == 0
    )
    assert found["a random one"]["value"] == pytest.approx(gain / 2, abs=0.01)
    for number, row in enumerate(rows):
        pair, names = Pair.from_json(row["pair"]), f"has {VIRTUES[2 * number]}"
        row["candidates"] = [proof(pair, f"{names}{end}", -0.1, -9, 20) for end in ("", " of one")]
    found = measured(tmp_path, rows, reasons)["choices"]["own words"]
    assert {(each["value"], each["low"], each["high"]) for each in found} == {(0, 0, 0)}


def test_reasons_that_a_prover_learnt_from_are_not_the_reference(reasons, tmp_path):
    """A human pair's rationale is made of its reasons: who repeats them has learnt them by heart."""
    rows = rows_of(reasons, lambda i, _: f"has {VIRTUES[i]}")
    rows[0]["pair"]["rationale"] = rows[0]["rationale"]
    found = measured(tmp_path, rows, reasons)
    assert level(found)["n"] == 7 and found["left out"] == {"a human rationale, made of its reasons": 1}


def test_a_checklist_is_a_reference_too(tmp_path, capsys):
    rows, proofs = [], []
    for number, virtue in enumerate(VIRTUES):
        pair = Pair((("user", "Tea?"),), f"yes {'x' * number}", f"no {'x' * number}", label="B")
        items = [f"Response 2 has {virtue}", f"Response 1 lacks {virtue}"]
        row = {"context": [{"role": "user", "content": "Tea?"}], "domain": "general"}
        row |= {"response1": pair.response_a, "response2": pair.response_b, "human-checklist": items}
        rows.append(row)
        proofs.append({"pair": pair.to_json(), "rationale": rationale(f"has {virtue}", "B")})
    for name, each in ("checklist", rows), ("proofs", proofs):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    words = [str(tmp_path / "proofs.jsonl"), "--reasons", str(tmp_path / "checklist.jsonl")]
    assert exit_status(faithfulness.main, [*words, "--json"]) == 0
    assert level(json.loads(capsys.readouterr().out))["low"] > 50
    assert exit_status(faithfulness.main, words) == 0 and "above chance [95%]" in capsys.readouterr().out
    del rows[1]["domain"]
    (tmp_path / "checklist.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert exit_status(faithfulness.main, words) == 2
    assert "checklist.jsonl: row 2: " in capsys.readouterr().err


def test_nothing_reads_the_reasons_but_the_measure():
    """What trains or filters would else be measured by what it has seen."""
    users = [path.stem for path in sources() if "read_corpus" in path.read_text(encoding="utf-8")]
    assert sorted(users) == ["convincing_arguments", "faithfulness"]
    assert not [path for path in sources() if any("extras.faithfulness" in name for name in imported(path))]
