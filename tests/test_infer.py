"""infer.py as a user types it: bad input, resumed bulk runs, kills, rankings, calibration."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SHORT_PROMPT, make_checkpoint, make_random_judge
from inferruns import Forks

from gramr2.commands import infer
from gramr2.extras.formats import FORMATS
from gramr2.extras.printing import judgment_text
from gramr2.files import exit_status
from gramr2.rankings import METHODS
from gramr2.records import Pair

BULK = ["--format", "label", "--json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model that judges by its first token, and has room for 200 tokens."""
    return make_random_judge(tmp_path_factory.mktemp("infer") / "model", max_positions=200)


def run(capsys, *words) -> tuple[int, str, str]:
    status = exit_status(infer.main, [str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out, said.err


def pair(number: int, **fields) -> dict:
    return {
        "question": f"What is {number}?",
        "response_a": f"It is {number}.",
        "response_b": "No idea.",
    } | fields


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------- bad input


BAD_PAIRS = {
    "no question": ('{"response_a": "x", "response_b": "y"}', 'no field "question"'),
    "one response": ('{"question": "q", "response_a": "x"}', 'no field "response_b"'),
    "not JSON": ("{question", "not JSON"),
    "not an object": ("[1]", "not an object"),
    "half a character": ('{"question": "\\ud800", "response_a": "x", "response_b": "y"}', "not Unicode"),
    "too deep": ("[" * 100_000, "not JSON"),
    "a long number": ("1" * 5_000, "not JSON"),
    "too long": (
        json.dumps(pair(1, response_a="word " * 300)),
        "tokens are too many for the model's 200 positions",
    ),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_is_one_line_and_status_2(name, model, tmp_path, capsys):
    content, expected = BAD_PAIRS[name]
    (tmp_path / "a.json").write_text(content)
    status, out, err = run(capsys, "--pair", tmp_path / "a.json", "--model", model, "--format", "label")
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == "" and expected in error
    assert name == "too long" or "a.json" in error


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--pair", "a.json", "--model", "."], "."),
        (["--pair", "a.json", "--model", "MODEL", "--votes", "3"], "--votes 3"),
        (["--pair", "a.json", "--model", "MODEL", "--format", "x"], "no format x"),
        (["--pair", "a.json", "--model", "MODEL", "--format", "scalar"], "scalar head"),
        (["--pairs", "a.json", "--model", "MODEL"], "--out"),
        (["--pair", "a.json", "--out", "o"], "--out"),
        (["--rank", "a.json", "--model", "MODEL"], '"responses"'),
        (["--score", "judgebench"], "judged file"),
        (["--score", "nothing", "a.json"], "no benchmark nothing"),
        (["--bench", "nothing", "a.json", "--out", "o", "--model", "MODEL"], "no benchmark nothing"),
        (["--bench", "judgebench", "a.json", "--out", "o", "--model", "MODEL"], "a.json"),
        (["--pairs", "a.json", "--out", ".", "--model", "MODEL", "--format", "label"], "Is a directory"),
        (["--pairs", "a.json", "--out", "a.json/b", "--model", "MODEL", "--format", "label"], "a.json"),
        (["--pairs", "a.json", "--out", "5.jsonl", "--model", "MODEL", "--format", "label"], "row 1"),
        (["--score", "ppe", "a.json"], 'no field "scores"'),
        (["--pair", "a.json", "--model", "nowhere"], "nowhere: no such model directory"),
        (["--pair", "a.json", "--model", "MODEL", "--top-p", "0"], "--top-p"),
        (["--pair", "a.json", "--model", "MODEL", "--limit", "3"], "--limit goes with"),
        (["--nosuch"], "--help"),
        (["--calibrate", "a.json", "--model", "."], "not a model directory"),
        (["--calibrate", "a.json", "--model", "MODEL"], 'no field "pair"'),
    ],
    ids=" ".join,
)
def test_bad_words_are_one_line_and_status_2(words, expected, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a.json"), [pair(1)])
    Path("5.jsonl").write_text("5\n")
    status, out, err = run(capsys, *(model if word == "MODEL" else word for word in words))
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == "" and expected in error


# ---------------------------------------------------------------------------------- one pair, one list


def test_no_preference_is_told_from_an_answer_that_cannot_be_read():
    pair = Pair((("user", "q"),), "one", "two")
    known = {"label": None, "p_a": 0.5, "orders_agree": None, "rationale": None, "details": (), "forged": ()}
    known["judge"] = {"format": "think"}
    for votes, said in (((0, 0, 0), "scores are equal"), ((1, 1, 0), "tied"), ((0, 0, 2), "could be read")):
        judgment = known | {"votes": dict(zip(("A", "B", "none"), votes, strict=True))}
        assert said in judgment_text(pair, judgment).splitlines()[0]


def test_where_nothing_could_be_read_it_says_why_with_an_example_and_what_to_do(model, tmp_path, capsys):
    """In a terminal, and in a line no longer than a screen holds: a model may write anything."""
    pair = Pair((("user", "q"),), "one", "two")
    texts = ["I am\nnot a judge" + " at all" * 400 + "\x1b[2J", "The second."]
    details = [{"label": None, "reason": "no answer", "text": text} for text in texts]
    row = {"label": None, "p_a": 0.5, "orders_agree": None, "rationale": None, "forged": ()}
    row |= {"votes": {"A": 0, "B": 0, "none": 2}, "details": details, "judge": {"format": "think"}}
    said = judgment_text(pair, row)
    assert "2 unreadable: no answer; one reads “I am not a judge at all" in said and "\x1b" not in said
    assert max(map(len, said.splitlines())) < 250
    assert "--format label" in said and "train.py --stage reward" in said
    one_read = row | {"details": [*details, {"label": "A", "reason": "", "text": ""}]}
    assert "What to do" not in judgment_text(pair, one_read)
    source, out = (
        write(tmp_path / "in.jsonl", [{"question": "q", "response_a": "x", "response_b": "y"}] * 3),
        tmp_path / "o",
    )
    words = ("--pairs", source, "--model", model, "--out", out, "--max-new-tokens", 3, "--limit", 2)
    status, _, err = run(capsys, *words)
    assert status == 0 and len(read(out)) == 2
    assert "no answer could be read" in err and "4 unreadable: cut at the length limit" in err


def test_votes_are_drawn_as_the_flags_say_or_else_the_checkpoint(tmp_path, capsys):
    """What the checkpoint's authors found to work is the default, and each row says how it was drawn."""
    place = make_checkpoint(tmp_path / "model", "qwen3", max_positions=600)
    (place / "judge_prompt.txt").write_text(SHORT_PROMPT)
    path = place / "generation_config.json"
    own = json.loads(path.read_text())
    write(tmp_path / "a.json", [pair(1)])

    def drawn(*words, **config):
        path.write_text(json.dumps(own | config))
        status, out, err = run(capsys, "--pair", tmp_path / "a.json", "--model", place, "--json", *words)
        assert status == 0
        judge = json.loads(out)["judge"]
        return [judge.get(name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")], err

    cut = ("--max-new-tokens", 2)
    assert drawn(*cut)[0] == [1.0, None, None, 2]  # as ever
    found, err = drawn(*cut, temperature=0.7, top_p=0.8, top_k=20)
    assert found == [0.7, 0.8, 20, 2]
    assert "16 x 2 tokens at most" in err and "(temperature, top_p, top_k: the checkpoint's" in err
    assert drawn(*cut, "--top-k", 5, "--temperature", 2, temperature=0.7, top_p=0.8)[0] == [2.0, 0.8, 5, 2]
    assert drawn(*cut, "--votes", 1, temperature=0.7, top_p=0.8)[0] == [0.0, None, None, 2]
    assert drawn(*cut, temperature=0.7, do_sample=False)[0] == [1.0, None, None, 2]
    # The temperature decides, not the number of votes.
    one = ("--votes", 1, "--temperature", 0.5)
    assert drawn(*cut, *one, temperature=0.7, top_p=0.8)[0] == [0.5, 0.8, None, 2]
    found, err = drawn(*cut, "--temperature", 0, temperature=0.7, top_p=0.8)
    assert found == [0.0, None, None, 2] and "greedy\n" in err
    assert drawn("--votes", 1, max_new_tokens=3)[0][3] == 3
    assert drawn("--votes", 1)[0][3] == 1024  # a small model's answers are short, or have no end
    (place / "training.json").write_text("{}")  # of a judge that was trained here the file is its base's
    assert drawn(*cut, temperature=0.7, top_p=0.8)[0] == [1.0, None, None, 2]


def test_identical_responses_are_said_to_be_so(model, tmp_path, capsys):
    write(tmp_path / "a.json", [pair(1, response_b="It is 1.")])
    status, out, _ = run(capsys, "--pair", tmp_path / "a.json", "--model", model, *BULK)
    judged = json.loads(out)
    assert status == 0 and judged["p_a"] == 0.5 and judged["label"] is None
    assert "identical" in run(capsys, "--pair", tmp_path / "a.json", "--model", model, *BULK[:2])[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_list_is_ranked_with_its_comparisons_counted(method, model, tmp_path, capsys):
    responses = ["one", "two", "", "four", "five"]
    write(tmp_path / "b.json", [{"question": "q", "responses": responses}])
    words = ("--rank", tmp_path / "b.json", "--method", method, "--model", model, "--format", "label")
    found = json.loads(run(capsys, *words, "--json")[1])
    assert sorted(found["order"]) == list(range(5)) and found["best"] == found["order"][0]
    assert 4 <= found["comparisons"] <= 10
    said = run(capsys, *words)[1]
    assert (
        f"The best is response {found['best'] + 1}." in said and f"{found['comparisons']} comparisons" in said
    )


def test_every_format_is_listed_with_its_reading(capsys):
    status, out, _ = run(capsys, "--formats")
    assert status == 0 and len(out.splitlines()) == len(FORMATS)
    assert all("; p is the" in line for line in out.splitlines())


# ---------------------------------------------------------------------------------- bulk


def test_a_bulk_run_goes_on_past_bad_rows_and_tries_them_again(model, tmp_path, capsys):
    rows = [pair(n) for n in range(5)]
    rows[1] = pair(1, response_a="word " * 300)
    rows[3] = {"question": "no responses"}
    rows.append(rows[0])  # the same row again is another row of the answer
    rows.append({**rows[0], "response_a": rows[0]["response_b"], "response_b": rows[0]["response_a"]})
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with source.open("a") as file:
        file.write("not json\n")
    words = ("--pairs", source, "--out", out, "--model", model, *BULK)
    counts = json.loads(run(capsys, *words)[1])
    assert counts == {"judged": 5, "before": 0, "failed": 3, "unread": 0, "forged": 0}
    failures = [row for row in read(out) if "error" in row]
    assert len(failures) == 3 and "200 positions" in failures[0]["error"]
    assert [row["id"] for row in failures[1:]] == ["row 4", "row 8"]
    counts = json.loads(run(capsys, *words)[1])
    assert counts == {"judged": 0, "before": 5, "failed": 3, "unread": 0, "forged": 0} and len(read(out)) == 8
    rows[1], rows[3] = pair(1), pair(3)
    write(source, rows)
    assert json.loads(run(capsys, *words)[1]) == {
        "judged": 2,
        "before": 5,
        "failed": 0,
        "unread": 0,
        "forged": 0,
    }
    assert len({row["id"] for row in read(out)}) == 5 and not any("error" in row for row in read(out))


def test_rows_of_other_settings_are_not_mixed_in(model, tmp_path, capsys):
    source, out = write(tmp_path / "in.jsonl", [pair(1)]), tmp_path / "out.jsonl"
    words = ("--pairs", source, "--out", out, "--model", model, *BULK)
    assert run(capsys, *words)[0] == 0
    status, _, err = run(capsys, *words, "--seed", "1")
    assert status == 2 and "seed 0, now 1" in err and "another --out" in err


def test_a_calibration_travels_with_the_model_and_the_table_says_so(tmp_path, capsys):
    place = make_checkpoint(tmp_path / "model", num_labels=1, tie_embeddings=False)
    rows = [pair(n, label="AB"[n % 3 == 0]) for n in range(40)]
    source, out, again = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    words = ("--pairs", source, "--model", place)
    assert run(capsys, *words, "--out", out)[0] == 0
    assert "not calibrated" in run(capsys, "--score", "pairs", out)[1]
    status, said, _ = run(capsys, "--calibrate", out, "--model", place)
    assert status == 0 and "40 pairs" in said
    other = make_checkpoint(tmp_path / "other", "qwen3", num_labels=1, tie_embeddings=False)
    status, _, err = run(capsys, "--calibrate", out, "--model", other)
    assert status == 2 and "other weights" in err  # another model's probabilities are distributed otherwise
    assert run(capsys, *words, "--out", again)[0] == 0
    assert "not calibrated" not in run(capsys, "--score", "pairs", again)[1]
    fitted = json.loads((place / "calibration.json").read_text())
    before, after = ([row["p_a"] for row in read(path)] for path in (out, again))
    assert after == pytest.approx(list(np.interp(before, fitted["p"], fitted["calibrated"])))
    assert len(set(before)) > 30 and before != after
    status, _, err = run(capsys, "--calibrate", again, "--model", place)
    assert status == 2 and "calibrated yet" in err  # a map of mapped values would be wrong
    assert run(capsys, *words, "--out", out)[0] == 2  # nor are mapped and unmapped rows mixed


# ---------------------------------------------------------------------------------- kills


def test_killed_three_times_and_continued_every_pair_is_judged_once(model, tmp_path):
    """Level 1: the same file as an uninterrupted run's."""
    source = write(tmp_path / "in.jsonl", [pair(n) for n in range(40)])
    words = ["--pairs", source, "--model", model, "--format", "think", "--votes", 4]
    words += ["--max-new-tokens", 16, "--out"]
    forks, out, whole = Forks(), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    try:
        assert forks.run([*words, whole], whole) == 0
        for rows in (1, 13, 24):
            assert forks.run([*words, out], out, rows) == -9
        with out.open("ab") as file:
            file.write(b'{"id": "torn')  # what a kill inside a write leaves
        assert forks.run([*words, out], out) == 0
    finally:
        forks.close()
    assert len(read(out)) == 40 and out.read_bytes() == whole.read_bytes()


def test_two_ranks_judge_the_same_file_and_go_on_where_one_was_killed(model, tmp_path):
    """Level 1: the same bytes as one process's, in the same order, whoever was first."""
    rows = [pair(n) for n in range(40)]
    rows[5] = {"question": "no responses"}
    rows[9] = pair(9, response_a="word " * 300)  # a failure, which the same command tries again
    source = write(tmp_path / "in.jsonl", rows)
    words = ["--pairs", source, "--model", model, "--votes", 4, "--max-new-tokens", 16, "--out"]
    forks, out, whole = Forks(), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"

    def shards() -> int:
        return len(list(tmp_path.glob(".out.jsonl.shards-*/shards/*.jsonl")))

    try:
        assert forks.run([*words, whole], whole) == 0
        statuses = forks.run_ranks(2, [*words, out], lambda: shards() >= 3)
        assert statuses[1] == -9 and statuses[0] == 1 and not out.exists() and shards() >= 3
        assert forks.run_ranks(2, [*words, out]) == [0, 0]
        assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob(".out*"))
        rows[9] = pair(9)
        write(source, rows)
        assert forks.run_ranks(2, [*words, out]) == [0, 0]  # one row for two ranks
        assert forks.run([*words, whole], whole) == 0
    finally:
        forks.close()
    assert out.read_bytes() == whole.read_bytes() and sum("error" in row for row in read(out)) == 1
    assert len(read(out)) == 40
