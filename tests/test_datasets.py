"""Readers of published data: on rows made to the published schemas, on hostile ones, on real slices."""

import contextlib
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from array import array
from collections import Counter
from itertools import pairwise
from pathlib import Path

import fresh
import pytest

from gramr2.extras import datasets
from gramr2.extras.datasets import DATASETS, Source, convert, main, plain
from gramr2.files import InputError, exit_status
from gramr2.prompts import parse_rationale
from gramr2.records import Pair, show

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GRAMR2_TEST_DATA", ROOT.parent / "shared/data"))


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def helpsteer(overall=-2, scores=(-2,), **fields):
    said = {"feedback1": "@Response 1 is short.", "feedback2": "It is not like Response 1.",
            "reasoning": "response 1 is better than @Response 2."}  # fmt: skip
    people = [{"score": score} | said for score in scores]
    row = {"domain": "stem", "language": "en", "context": turns("q", "a", "again?"), "response1": "x",
           "response2": "y", "overall_preference": overall, "individual_preference": people}  # fmt: skip
    return row | fields


GRAM_RR = """Judge. Here is the data.

[User Question]
why?

[The Start of Assistant A's Response]
because
[The End of Assistant A's Response]

[The Start of Assistant B's Response]
{b}
[The End of Assistant B's Response]"""
Z = "Feedback:\nf\n\nComparision:\nResponse A wins\n\nConclusion:\nd"
ANSWER = f"<think>\n{Z}\n</think>\n<answer>\nA\n</answer>"

PATH = "Natural.jsonl"  # LLMBar's subsets are told from the path
# A row to each published schema, and what it comes to: (question, response a, response b, label) or a reason.
ROWS = [
    ("helpsteer3", helpsteer(), [("User: q\n\nAssistant: a\n\nUser: again?", "x", "y", "A")]),
    ("helpsteer3", helpsteer(3), [("User: q\n\nAssistant: a\n\nUser: again?", "x", "y", "B")]),
    ("helpsteer3", helpsteer(0), ["tie"]),
    ("multipref", {"comparison_id": "c", "text": "q", "completion_a": "x", "completion_b": "y",
                   "expert_worker_annotations": [{"overall_pref": "A-is-clearly-better"}],
                   "normal_worker_annotations": [{"overall_pref": "B-is-slightly-better"}]},
     [("q", "x", "y", "A")]),
    ("multipref", {"text": "q", "completion_a": "x", "completion_b": "y", "expert_worker_annotations": [],
                   "normal_worker_annotations": [{"overall_pref": "Tie"}]}, ["tie"]),
    ("codeultrafeedback", {"instruction": "q", "models": ["m", "n", "o", "p"],
                           "responses": [{"model": m, "response": m.upper()} for m in "mnop"],
                           "annotations": [{"model": "n", "rating": "3"}, {"model": "m", "rating": "5"},
                                           {"model": "o", "rating": "3"}, {"model": "p", "rating": "N/A"}]},
     [("q", "M", "N", "A"), ("q", "M", "O", "A"), "no rating", "tie", "no rating", "no rating"]),
    ("unified-feedback", {"id": 1, "conv_A": turns("q", "x"), "conv_B": turns("q", "y"), "conv_A_rating": 1.0,
                          "conv_B_rating": 2.5, "num_turns": 1, "source": "s"}, [("q", "x", "y", "B")]),
    ("unified-feedback", {"conv_A": turns("q", "x"), "conv_B": turns("q", "y"), "conv_A_rating": 1,
                          "conv_B_rating": 1.0}, ["tie"]),
    ("unified-feedback", {"conv_A": turns("q", "x"), "conv_B": turns("r", "y"), "conv_A_rating": 1,
                          "conv_B_rating": 0}, ["different conversations"]),
    ("preference-collection", {"orig_instruction": "q", "orig_response_A": "x", "orig_response_B": "y",
                               "orig_score_A": "2", "orig_score_B": 5, "orig_preference": "B"},
     [("q", "x", "y", "B")]),
    ("safe-rlhf-better", {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": 1,
                          "safer_response_id": 0}, [("q", "x", "y", "B")]),
    ("safe-rlhf-safer", {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": 1,
                         "safer_response_id": 0}, [("q", "x", "y", "A")]),
    ("skywork-80k", {"chosen": turns("q", "x"), "rejected": turns("q", "y"), "source": "s"},
     [("q", "x", "y", "A")]),
    ("gram-rr", {"instruction": GRAM_RR.format(b="so"), "input": "", "output": ANSWER},
     [("why?", "because", "so", "A")]),
    ("gram-rr", {"instruction": GRAM_RR.format(b="x\n[The End of Assistant A's Response]"), "output": ANSWER},
     ["ambiguous delimiters"]),
    ("gram-rr", {"instruction": GRAM_RR.format(b="so"), "output": "<think>A"}, ["no verdict"]),
    ("judgebench", {"pair_id": "p", "original_id": 1, "source": "livecodebench", "question": "q",
                    "label": "B>A", "response_model": "m", "response_A": "x", "response_B": "y"},
     [("q", "x", "y", "B")]),
    ("rm-bench", {"id": 4, "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"],
                  "domain": "chat"},
     [("q", c, r, "A") for c in "abc" for r in "def"]),
    ("rewardbench", {"id": 4, "prompt": "q", "chosen": "x", "rejected": "y", "subset": "hep-go",
                     "chosen_model": "m", "rejected_model": "n"}, [("q", "x", "y", "A")]),
    ("rewardbench2", {"id": "tied:4", "prompt": "q", "chosen": ["a", "b"], "rejected": ["d", "e"],
                      "num_correct": 2, "num_incorrect": 2, "total_completions": 4, "subset": "Ties"},
     [("q", c, r, "A") for c in "ab" for r in "de"]),
    ("rewardbench2", {"id": "4", "prompt": "q", "chosen": ["a"], "rejected": ["d", "e", "f"],
                      "num_correct": 1, "subset": "Focus"}, [("q", "a", r, "A") for r in "def"]),
    ("llmbar", {"input": "q", "output_1": "x", "output_2": "y", "label": 2}, [("q", "x", "y", "B")]),
    ("rmb", {"pair_uid": "4", "conversation_input": turns("q"),
             "category_path": "Pairwise_set/Harmlessness/S1",
             "chosen": {"answer": "x"}, "reject": {"answer": "y"}}, [("q", "x", "y", "A")]),
    ("rmb", {"bon_uid": "4", "conversation_input": turns("q"),
             "category_path": "BoN_set/Helpfulness/Code/Data",
             "bon_best": {"answer": "x"}, "loser_list": [{"answer": "y"}, {"answer": "z"}]},
     [("q", "x", "y", "A"), ("q", "x", "z", "A")]),
    ("pairs", {"instruction": "q", "chosen": "x", "rejected": "y"}, [("q", "x", "y", "A")]),
    ("stack-exchange", {"qid": 1, "question": "<p>q</p>", "answers": [{"text": "<p>a</p>", "pm_score": "9"}]},
     ["fewer than two answers"]),
]  # fmt: skip


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name, row, expected", ROWS)
def test_reader(name, row, expected, tmp_path):
    found = DATASETS[name].items(row, Source(written(tmp_path / PATH, [])))
    short = [i if isinstance(i, str) else (i.question, i.response_a, i.response_b, i.label) for i in found]
    assert short == expected


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "ppe"])
def test_every_format_is_tried_and_names_a_missing_field(name, tmp_path):
    """Each field that a reader needs is missed by its name; so is a field of another type."""
    row = next(row for known, row, _ in ROWS if known == name)
    optional = {"input", "language", "models", "comparison_id", "id", "num_turns", "source", "original_id",
                "domain", "response_model", "qid", "better_response_id", "safer_response_id",
                "num_incorrect", "total_completions", "chosen_model", "rejected_model"}  # fmt: skip
    source = Source(written(tmp_path / PATH, []))
    needed = row.keys() - optional
    for gone in needed:
        wrong = {key: value for key, value in row.items() if key != gone}
        said = "question|response_[ab]" if name == "pairs" else gone  # pairs: the field it is a spelling of
        with pytest.raises(InputError, match=f'no field "({said})"'):
            DATASETS[name].items(wrong, source)
    for key in needed:
        for value in (None, 7, "\ud800", [None], [[]], {}, float("nan")):
            with contextlib.suppress(InputError, UnicodeEncodeError):
                DATASETS[name].items(row | {key: value}, source)


def test_helpsteer3_rationale_is_the_agreeing_annotators(tmp_path):
    """z is what a person said who agrees with the label; its mentions are slots."""
    source = Source(written(tmp_path / "x.jsonl", []))
    pair = DATASETS["helpsteer3"].items(helpsteer(-2, (3, -3, -2)), source)[0]
    z = parse_rationale(pair.rationale).rationale
    assert z.feedback == ("Response ⟦A⟧: Response ⟦A⟧ is short.\nResponse ⟦B⟧: It is not like Response ⟦A⟧.")
    assert z.comparison == "Response ⟦A⟧ is better than Response ⟦B⟧."
    assert show(z.conclusion) == "Response A is better than Response B." and pair.swappable
    assert "Response B is better than Response A" in show(pair.swapped().rationale)
    assert DATASETS["helpsteer3"].items(helpsteer(-2, (3, 0)), source)[0].rationale is None
    people = helpsteer()["individual_preference"]
    people[0]["reasoning"] = "so\nConclusion:\nx"
    assert DATASETS["helpsteer3"].items(helpsteer(individual_preference=people), source)[0].rationale is None


def test_html_becomes_text_with_its_code():
    markup = (
        "<p>Use <code>a&lt;b</code>\n and <a href='x'>this</a>:</p>\n<pre><code>if a  &lt; b:\n"
        "    &lt;p&gt;\n</code></pre><ul>\n<li>one</li>\n<li>two &amp; <b>three</b></li></ul><p>End<br>now"
    )
    assert plain(markup) == (
        "Use `a<b` and this:\n\n```\nif a  < b:\n    <p>\n```\n\n- one\n- two & three\n\nEnd\nnow"
    )


def test_html_keeps_words_and_powers_apart():
    """2 to the tenth is not 210, and two cells are not one word."""
    markup = "<div>2<sup>10</sup></div><div>a<sub>1</sub></div><table><tr><th>x</th><th>y</th></tr></table>"
    assert plain(markup) == "2^10\n\na_1\n\nx y"
    assert plain("<dl><dt>k</dt><dd>v</dd></dl><h4>T</h4>end") == "k\nv\n\nT\n\nend"


@pytest.mark.parametrize("markup", ["<![if x]>", "<p", "<!", "&#xffffffff;", "</pre></p>", "<pre><p>a", ""])
def test_odd_html_is_text_or_a_malformed_row(markup):
    with contextlib.suppress(InputError):
        assert isinstance(plain(markup), str)


def test_stack_exchange_draws_pairs_without_labels(tmp_path):
    """The site's score must not become a label, nor decide who stands where."""
    answers = [
        {"answer_id": k, "pm_score": str(k), "selected": k == 0, "text": f"<p>a{k}</p>"} for k in range(5)
    ]
    row = {"qid": 1, "question": "<p>q</p>", "answers": answers}
    path = written(tmp_path / "x.jsonl", [])
    drawn = [DATASETS["stack-exchange"].items(row, Source(path, seed)) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({str(found) for found in drawn}) > 2
    for found in drawn:
        used = [text for pair in found for text in (pair.response_a, pair.response_b)]
        assert len(found) == datasets.DRAWS and len(set(used)) == 2 * len(found)
        assert all(pair.label is None and pair.margin is None for pair in found)


def test_ppe_rows_are_lists_with_scores(tmp_path):
    row = {"question_id": 5, "model_name": "m", "prompt": "q", "scores": [k % 2 == 0 for k in range(32)],
           "conflict_pairs": [[0, 1]], "sampled_conflict_pairs": []}  # fmt: skip
    row |= {f"response_{k}": f"r{k}" for k in range(1, 33)}
    convert("ppe", written(tmp_path / "x.jsonl", [row]), tmp_path / "out.jsonl")
    (found,) = read(tmp_path / "out.jsonl")
    assert found["responses"] == [f"r{k}" for k in range(1, 33)] and found["scores"] == [1.0, 0.0] * 16
    assert found["meta"]["conflict_pairs"] == [[0, 1]] and (found["question"], found["id"]) == ("q", "5")
    del row["response_32"]
    with pytest.raises(InputError, match="scores"):
        convert("ppe", written(tmp_path / "x.jsonl", [row]), tmp_path / "out.jsonl")


def test_real_rm_bench(tmp_path):
    path = DATA / "rm-bench_chat_filtered.json"
    if not path.is_file():
        pytest.skip(f"no published slice in {DATA}")
    account = convert("rm-bench", path, tmp_path / "out.jsonl")
    rows, published = read(tmp_path / "out.jsonl"), json.loads(path.read_text(encoding="utf-8"))
    assert account.read == 129 and len(rows) == 9 * 129
    for row in rows:
        original = next(one for one in published if one["id"] == row["meta"]["prompt"])
        cell = original["chosen"][row["meta"]["chosen"]], original["rejected"][row["meta"]["rejected"]]
        assert (
            (row["response_a"], row["response_b"]) == cell and row["label"] == "A" and row["domain"] == "chat"
        )


def test_real_judgebench(tmp_path):
    path = DATA / "judgebench_claude.jsonl"
    if not path.is_file():
        pytest.skip(f"no published slice in {DATA}")
    convert("judgebench", path, tmp_path / "out.jsonl")
    rows, published = read(tmp_path / "out.jsonl"), read(path)
    assert [(r["question"], r["response_a"], r["response_b"], f"{r['label']}>") for r in rows] == [
        (p["question"], p["response_A"], p["response_B"], p["label"][:2]) for p in published
    ]
    count = Counter(row["domain"] for row in rows)
    assert count == {"knowledge": 154, "reasoning": 51, "math": 34, "coding": 31}
    with pytest.raises(InputError, match=r"overlap with judgebench_claude\.jsonl 269"):
        convert("pairs", tmp_path / "out.jsonl", tmp_path / "clean.jsonl", against=[path])
    assert not (tmp_path / "clean.jsonl").exists()


# --- what is dropped, and where the better response stands -----------------------------------------------


def pair_row(i, chosen=None, rejected=None, **more):
    return {"prompt": f"q{i}", "chosen": chosen or f"good {i}", "rejected": rejected or f"bad {i}"} | more


def test_every_reason_is_counted(tmp_path):
    rows = [
        pair_row(0),
        pair_row(1, rejected=" "),
        pair_row(2, "x", "x "),
        pair_row(0),
        pair_row(3, "y" * 99),
    ]
    rows.append({"prompt": "q0", "response_a": "bad 0", "response_b": "good 0", "label": "B"})
    rows = [row | {"domain": "code"} for row in rows] + [pair_row(9, domain="stem"), pair_row(8)]
    path, out, how = written(tmp_path / "x.jsonl", rows), tmp_path / "o.jsonl", {"domain": ["code", "math"]}
    account = convert("pairs", path, out, max_characters=50, **how)
    reasons = {"empty": 1, "identical responses": 1, "duplicate": 2, "over-long": 1, "of another domain": 2}
    assert account.dropped == reasons
    assert account.read == 8 and account.kept.total() == len(read(tmp_path / "o.jsonl")) == 1
    assert any("duplicate 2" in line for line in account.lines())


def test_the_better_response_is_placed_evenly_and_by_the_seed(tmp_path):
    """Otherwise the judge learns the place."""
    path = written(tmp_path / "x.jsonl", [pair_row(i) for i in range(500)])
    found = []
    for seed in (0, 0, 1):
        convert("pairs", path, tmp_path / "o.jsonl", seed=seed)
        found.append([Pair.from_json(row) for row in read(tmp_path / "o.jsonl")])
    labels = [pair.label for pair in found[0]]
    assert abs(labels.count("A") - labels.count("B")) <= 1
    assert found[0] == found[1] != found[2]
    assert all("good" in (p.response_a if p.label == "A" else p.response_b) for p in found[0] + found[2])
    assert 80 < sum(one == two for one, two in pairwise(labels)) < 170  # no mere alternation


def test_overlap_with_a_benchmark_is_removed(tmp_path):
    """13 words in a row, whatever their case and punctuation, or a whole question that is shorter."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "while",
        "nobody",
        "at",
        "all",
        "watches",
        "it",
        "go",
        "home",
    ]
    bench = [{"pair_id": "p", "source": "livecodebench", "question": "short question?", "label": "A>B",
              "response_A": " ".join(words), "response_B": "z"}]  # fmt: skip
    rows = [pair_row(0, "Well: " + ", ".join(words[2:15]).upper() + "!"), pair_row(1, " ".join(words[:12])),
            pair_row(2) | {"prompt": "Short QUESTION"}, pair_row(3, "short question")]  # fmt: skip
    account = convert("pairs", written(tmp_path / "x.jsonl", rows), tmp_path / "o.jsonl",
                      against=[written(tmp_path / "bench.jsonl", bench)])  # fmt: skip
    assert account.dropped == {"overlap with bench.jsonl": 2}
    assert {row["question"] for row in read(tmp_path / "o.jsonl")} == {"q1", "q3"}


def test_any_benchmark_file_can_be_kept_clear_of(tmp_path):
    """Each format is known by its rows, also RM-Bench's files by domain under another name."""
    row = dict(next(row for name, row, _ in ROWS if name == "rm-bench"))
    del row["domain"]
    listed = {"question_id": 1, "prompt": "q2", "scores": [1], "response_1": "x"}
    benches = [written(tmp_path / "rm.jsonl", [row]), written(tmp_path / "ppe.jsonl", [listed]),
               written(tmp_path / "ours.jsonl", [pair_row(3) | {"prompt": "q3"}])]  # fmt: skip
    path = written(tmp_path / "x.jsonl", [pair_row(i) | {"prompt": f"q{i}".strip("0")} for i in range(5)])
    account = convert("pairs", path, tmp_path / "o.jsonl", against=benches)
    assert account.dropped == {f"overlap with {one}.jsonl": 1 for one in ("rm", "ppe", "ours")}
    with pytest.raises(InputError, match='no field "domain"'):
        convert("rm-bench", benches[0], tmp_path / "o.jsonl")


def test_a_rationale_that_cannot_be_swapped_stays_in_its_order(tmp_path):
    rows = [pair_row(i, rationale="The first response is better.") for i in range(20)]
    account = convert("pairs", written(tmp_path / "x.jsonl", rows), tmp_path / "o.jsonl")
    assert {row["label"] for row in read(tmp_path / "o.jsonl")} == {"A"}
    assert account.notes["with a rationale for its own order only"] == 20


# --- files -----------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_pairs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [pair_row(i, "⟦é\u2028" * i + "x") for i in range(300)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    array = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    (tmp_path / "x.jsonl").write_bytes(lines.replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + array)
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(array))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "z.parquet")
    outputs = set()
    for path in sorted(tmp_path.iterdir()):
        assert convert("pairs", path, tmp_path / "out" / "o.jsonl").kept.total() == 300
        outputs.add((tmp_path / "out" / "o.jsonl").read_bytes())
    assert len(outputs) == 1
    account = convert("pairs", tmp_path, tmp_path / "all.jsonl")
    assert (account.kept.total(), account.dropped) == (300, {"duplicate": 1500})  # out/ is below it, too


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_json_array_reads_the_same_through_any_window(size, tmp_path, monkeypatch):
    """A chunk may end within an escape, a number, a character, or a literal."""
    value = [{"a": '\\u00e9"é\\', "b": [1.5e-3, -20, True, None, {}], "c": "x" * 40}, 12345, "s", [], -1.5]
    path = tmp_path / "x.json"
    path.write_text(" " + json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    chunks = Source.chunks
    monkeypatch.setattr(Source, "chunks", lambda self: chunks(self, size))
    assert [row for _, row in Source(path)] == value


BROKEN = {
    "cut.json": (b'[{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q', "cut in the middle"),
    "cut2.json": (b'[{"prompt": "q", "chosen": "a", "rejected": "b"}', "cut in the middle"),
    "cut3.json": (b'[{"prompt": "q", "chosen": "a", "rejected": "b"},', "cut in the middle"),
    "comma.json": (b'[{"prompt": "q", "chosen": "a", "rejected": "b"} {}]', 'expected ","'),
    "more.json": (b"[] []", 'expected "," or the end'),
    "object.json": (b'{"prompt": "q"}', "named .jsonl"),
    "syntax.json": (b'[{"prompt": nope, "chosen": "a and much more text than that"}]', "not JSON"),
    "deep.json": (b"[" * 200_000, "too deep"),
    "empty.json": (b"", "not a JSON array"),
    "utf8.json": (b'[{"prompt": "\xff"}]', "not UTF-8"),
    "utf8.jsonl": (
        b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "\xff"}\n',
        "line 2 is not UTF-8",
    ),
    "empty.jsonl": (b"\n\n", "no rows"),
    "schema.jsonl": (b'{"text": "q"}\n' * 3, 'line 1 (no field "response_a"'),
    "number.jsonl": (b"17\n" * 3, "not an object"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", "too deep"),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b"}\n", "too long"),
    "cut.jsonl.gz": (gzip.compress(os.urandom(4000).hex().encode())[:-900], "broken gzip"),
    "not.jsonl.gz": (b"plain text", "broken gzip"),
    "bad.parquet": (b"PAR1 nonsense PAR1", "not a readable parquet"),
    "x.csv": (b"a,b", "should end in one of .jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_and_leaves_nothing(name, tmp_path, capsys):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    assert exit_status(main, ["pairs", str(tmp_path / name), str(tmp_path / "out.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert said in err and name in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    assert exit_status(main, ["pairs", str(tmp_path / "x.parquet"), str(tmp_path / "o.jsonl")]) == 2
    assert "gramr2[parquet]" in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("arguments, said", [
    (["helpsteer"], "no format \"helpsteer\"; there are pairs, helpsteer3"), (["pairs"], "name an input"),
    (["pairs", "a.jsonl", "o.jsonl", "--frob"], "--frob"), (["pairs", "x.jsonl", "out.txt"], "in .jsonl"),
    (["pairs", "absent.jsonl", "o.jsonl"], "absent.jsonl"),
    (["rm-bench", "a.json", "o.jsonl", "--against", "b.json"], "benchmark, and converted whole"),
])  # fmt: skip
def test_a_wrong_command_is_one_line(arguments, said, capsys):
    assert exit_status(main, arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_malformed_rows_up_to_the_limit_are_counted_with_their_lines(tmp_path):
    """1% by default, and one row always; a benchmark allows none."""
    rows = [pair_row(i) for i in range(300)]
    for line in (4, 100, 200):
        rows[line - 1] = {"prompt": "q", "chosen": "a"}
    rows[199] = pair_row(7, "\ud800")
    account = convert("pairs", written(tmp_path / "x.jsonl", rows), tmp_path / "o.jsonl")
    assert account.malformed == 3 and account.kept.total() == 297
    assert [shown.split(" (")[0] for shown in account.shown] == ["line 4", "line 100", "line 200"]
    with pytest.raises(InputError, match=r"4 of 301 rows .* line 1 \(not JSON"):
        (tmp_path / "x.jsonl").write_text("{\n" + (tmp_path / "x.jsonl").read_text())
        convert("pairs", tmp_path / "x.jsonl", tmp_path / "o.jsonl")
    assert convert("pairs", tmp_path / "x.jsonl", tmp_path / "p.jsonl", malformed_limit=0.1).malformed == 4
    one = written(tmp_path / "y.jsonl", [pair_row(0), {}])
    assert convert("pairs", one, tmp_path / "o.jsonl").malformed == 1
    bench = [next(row for name, row, _ in ROWS if name == "judgebench"), {}]
    with pytest.raises(InputError, match="1 of 2 rows"):
        convert("judgebench", written(tmp_path / "y.jsonl", bench), tmp_path / "o.jsonl")


def test_an_interrupt_leaves_no_output(tmp_path):
    """Ctrl-C in the middle: exit status 130, and neither the output nor a part of it."""
    written(tmp_path / "x.jsonl", map(pair_row, range(200_000)))
    command = [sys.executable, "-m", "gramr2.extras.datasets", "pairs", "x.jsonl", "o.jsonl"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits a Ctrl-C that is ignored, and would hand it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob(".o.jsonl.tmp-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and error == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_duplicates_are_found_in_eight_bytes_a_pair():
    """The set says what a set says, and holds nothing but the keys."""
    keys = [random.Random(i // 2).getrandbits(64) for i in range(20_000)]
    random.Random(0).shuffle(keys)
    seen, oracle = datasets.Seen(), set()
    for key in keys:
        assert seen.add(key) == (key not in oracle)
        oracle.add(key)
    assert sum(map(len, seen.buckets)) == len(oracle)
    assert all(isinstance(bucket, array) and bucket.itemsize == 8 for bucket in seen.buckets)


def convert_and_measure(source: str, target: str) -> None:
    """Prints the KiB that this process came to hold."""
    datasets.convert("pairs", source, target)
    print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak from /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    """5,000 and 50,000 rows: the same peak, give or take 8 bytes a pair (and the noise of an allocator)."""
    peaks = []
    for count in (5_000, 50_000):
        path = written(tmp_path / f"{count}.jsonl", (pair_row(i, f"{i} " * 100) for i in range(count)))
        peaks.append(int(fresh.run(convert_and_measure, str(path), str(tmp_path / "o.jsonl"))) * 1024)
    assert (tmp_path / "50000.jsonl").stat().st_size > 30e6 and peaks[1] - peaks[0] < 8e6
