"""The benchmarks' own arithmetic, on made files with hand-computed results and on real slices."""

import itertools
import json
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from gramr2.commands import infer
from gramr2.extras import evaluate
from gramr2.extras.results import accuracy_row
from gramr2.files import InputError, exit_status
from gramr2.judge import RewardModel
from gramr2.records import OTHER, Judgment, Pair, Vote

DATA = Path(os.environ.get("GRAMR2_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published slices are not on this machine")


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(result) -> dict[str, float]:
    return {each["name"]: each["value"] for each in result["averages"]}


def published(source: str, label: str, *decisions) -> dict:
    """A row as JudgeBench's judgment files have it; the second decision is in the exchanged order."""
    made = {"pair_id": f"{source} {label} {decisions}", "source": source, "question": "q", "label": label}
    judgments = [decision and {"judgment": {"response": ""}, "decision": decision} for decision in decisions]
    return made | {"response_model": "m", "response_A": "a", "response_B": "b", "judgments": judgments}


def row(label, truth="A", p_a=None, **more) -> dict:
    p_a = {"A": 0.9, "B": 0.1, None: 0.5}[label] if p_a is None else p_a
    judged = Judgment(label, p_a, {"A": 0, "B": 0, "none": 0}).to_json()
    question = (("user", f"q{random.random()}"),)
    pair = Pair(question, "a", "b", truth, domain=more.pop("domain", ""), meta=more.pop("meta", {})).to_json()
    return {"id": pair["id"], **judged, "pair": pair, **more}


# ---------------------------------------------------------------------------------- JudgeBench

A, B, TIE = "A>B", "B>A", "A=B"
RULE = [  # label, first, second as asked: correct?
    (A, A, B, True),  # right twice
    (B, B, A, True),
    (A, A, A, False),  # always the first: once for, once against
    (A, B, B, False),
    (A, B, A, False),  # wrong twice
    (A, A, TIE, True),  # right once, undecided once
    (A, TIE, B, True),
    (A, TIE, TIE, False),
    (A, A, None, True),  # right once, unreadable once
    (B, A, None, False),
    (A, None, None, False),
]


def test_judgebench_counts_both_orders_as_its_authors_do(tmp_path):
    rows = [published("mmlu-pro-law", *case[:3]) for case in RULE]
    result = evaluate.score("judgebench", [write(tmp_path / "made.jsonl", rows)])
    right = sum(case[3] for case in RULE)
    assert values(result)["knowledge"] == pytest.approx(100 * right / len(RULE), abs=0.01)
    for case in RULE:
        path = write(tmp_path / "one.jsonl", [published("livecodebench", *case[:3])])
        assert values(evaluate.score("judgebench", [path]))["coding"] == 100 * case[3], case


def test_judgebench_has_the_papers_mean_and_the_benchmarks_own(tmp_path):
    """350 pairs, right as often as Skywork-Reward-LLaMA-3.1-8B: the paper's row, to the digit."""
    sources = {"mmlu-pro-law": (91, 154), "livebench-reasoning": (63, 98), "livebench-math": (43, 56)}
    sources["livecodebench"] = (21, 42)
    rows = []
    for source, (right, count) in sources.items():
        for number in range(count):
            label = (A, B)[number % 2]
            first = label if number < right else {A: B, B: A}[label]
            rows.append(
                published(source, label, first, {A: B, B: A}[first]) | {"pair_id": f"{source} {number}"}
            )
    result = evaluate.score("judgebench", [write(tmp_path / "made.jsonl", rows)])
    shown = {name: f"{value:.1f}" for name, value in values(result).items()}
    assert shown == {
        "knowledge": "59.1",
        "reasoning": "64.3",
        "math": "76.8",
        "coding": "50.0",
        "mean of the four categories (the paper's Overall)": "62.5",
        "mean over pairs (the benchmark's own)": "62.3",
    }
    assert result["consistency"] == 1.0 and result["abstention"] == 0.0 and result.get("ece") is None
    assert "62.5" in evaluate.readable(result)


def test_an_always_first_judge_gets_nothing_at_judgebench(tmp_path):
    """Its p_a is one half, and its lean must not count."""
    votes = [Vote("A", "AB", 0.93), Vote("B", "BA", 0.08)]
    rows = []
    for label in "AB":
        judged = Judgment.from_votes(votes).to_json()
        pair = Pair((("user", label),), "x", "y", label, domain="math").to_json()
        rows.append({"id": pair["id"], **judged, "pair": pair})
    result = evaluate.score("judgebench", [write(tmp_path / "judged.jsonl", rows)])
    assert values(result)["math"] == 0 and result["consistency"] == 0
    one = [{**rows[0], "details": rows[0]["details"][:1], "votes": {"A": 1, "B": 0, "none": 0}}]
    with pytest.raises(InputError, match="both"):
        evaluate.score("judgebench", [write(tmp_path / "one.jsonl", one)])


# ---------------------------------------------------------------------------------- RM-Bench


def rm_row(domain, prompt, chosen, rejected, right, subset=None):
    meta = {"prompt": prompt, "subset": subset or domain, "chosen": chosen, "rejected": rejected}
    return row("A" if right else "B", domain=domain, meta=meta)


def test_rm_bench_reads_its_matrices_by_chosen_rows_and_rejected_columns(tmp_path):
    """Right exactly where the chosen style is the fancier one: easy 100, normal and hard 0."""
    rows = [rm_row("chat", 1, i, j, i > j) for i in range(3) for j in range(3)]
    rows += [rm_row("safety", 1, i, j, True, "safety-refuse") for i in range(3) for j in range(3)]
    rows += [rm_row("safety", 1, i, j, False, "safety-response") for i in range(3) for j in range(3)]
    rows += [rm_row("safety", 2, i, j, False, "safety-response") for i in range(3) for j in range(3)]
    result = evaluate.score("rm-bench", [write(tmp_path / "judged.jsonl", rows)])
    found = values(result)
    assert found["chat"] == pytest.approx(100 / 3, abs=0.01) and found["safety"] == pytest.approx(
        100 / 3, abs=0.01
    )
    assert found["easy, mean of the domains"] == pytest.approx((100 + 100 / 3) / 2, abs=0.01)
    assert found["normal, mean of the domains"] == pytest.approx((0 + 100 / 3) / 2, abs=0.01)
    assert found["hard, mean of the domains"] == pytest.approx((0 + 100 / 3) / 2, abs=0.01)
    assert found["mean of 2 domains (overall)"] == pytest.approx(100 / 3, abs=0.01)
    cut = evaluate.score("rm-bench", [write(tmp_path / "cut.jsonl", rows[:-1])])
    assert values(cut)["safety"] == 50 and "1 prompts without" in cut["more"]


# ---------------------------------------------------------------------------------- PPE


def test_ppe_curves_beside_the_oracle_and_chance(tmp_path):
    """A linear search's path: its pick among the first k needs no comparison with what comes later."""

    def answer(a, b, p):
        return {
            "a": a,
            "b": b,
            "p": p,
            **Judgment("A" if p > 0.5 else "B", p, {"A": 0, "B": 0, "none": 0}).to_json(),
        }

    # The challenger wins, loses, and is not preferred: picks 0, 1, 1, 1.
    one = {
        "id": "1",
        "scores": [0, 1, 0, 1],
        "comparisons": [answer(1, 0, 0.9), answer(2, 1, 0.2), answer(3, 1, 0.5)],
    }
    failed = {"id": "2", "scores": [1, 1, 0, 0], "error": "too long"}
    result = evaluate.score("ppe", [write(tmp_path / "judged.jsonl", [one, failed])])
    found = {each["name"]: (each["value"], each["oracle"], each["chance"]) for each in result["averages"]}
    assert found == {"best of 1": (0, 50, 50), "best of 2": (50, 100, 75), "best of 4": (50, 100, 50)}
    assert result["failed"] == 1 and result["brier"] == pytest.approx((0.01 + 0.04) / 2)


# ---------------------------------------------------------------------------------- probabilities


def test_an_average_of_groups_is_not_the_average_of_their_items():
    made = evaluate.average("x", [[1] * 90 + [0] * 10, [0] * 10])
    assert made["value"] == 45 and made["n"] == 110 and made["low"] < 45 < made["high"]
    assert made == evaluate.average("x", [[1] * 90 + [0] * 10, [0] * 10])
    # 1.96 standard errors of a coin's mean
    coin = evaluate.average("x", [[0, 1] * 200])
    assert coin["low"] == pytest.approx(50 - 4.9, abs=0.6) and coin["high"] == pytest.approx(
        50 + 4.9, abs=0.6
    )


def test_calibration_figures_by_hand():
    p, labels = [0.9, 0.9, 0.3, 0.5], ["A", "B", "B", "A"]
    # to the truth: 0.9, 0.1, 0.7, 0.5; sure 0.9 0.9 0.7 0.5; right 1 0 1 1/2
    found = evaluate.calibration(p, labels)
    assert found["brier"] == pytest.approx((0.01 + 0.81 + 0.09 + 0.25) / 4)
    assert found["ece"] == pytest.approx((abs(0.5 - 0.9) * 2 + abs(1 - 0.7) + 0) / 4)
    assert found["covered"] == pytest.approx(0.5)  # the two at 0.9
    tied = evaluate.calibration([0.9, 0.7, 0.7, 0.7], ["A", "A", "A", "B"])
    assert tied["covered"] == pytest.approx((1 + 2 / 3) / 2)  # one of the three at the edge, whichever


def test_a_calibrator_recovers_planted_confidences():
    """A judge that says p and is right with g(p): the map is g, the same for both letters."""
    rng, rows = random.Random(0), []
    for _ in range(6000):
        said = rng.uniform(0.5, 1)
        true = 0.5 + (said - 0.5) * 0.6
        truth, letter = rng.choice("AB"), None
        letter = truth if rng.random() < true else OTHER[truth]
        rows.append(row(letter, truth, said if letter == "A" else 1 - said))
    fitted = evaluate.fit_calibrator(rows)
    assert fitted["calibrated"] == sorted(fitted["calibrated"]) and fitted["pairs"] == 6000
    for p in (0.55, 0.7, 0.85, 0.95):
        found = evaluate.np.interp([p, 1 - p], fitted["p"], fitted["calibrated"])
        assert found[0] == pytest.approx(0.5 + (p - 0.5) * 0.6, abs=0.05)
        assert found.sum() == pytest.approx(1)
    assert fitted["calibrated"][0] > 0 and fitted["calibrated"][-1] < 1
    with pytest.raises(InputError, match="needs 30"):
        evaluate.fit_calibrator(rows[:29])
    with pytest.raises(InputError, match="alike"):
        evaluate.fit_calibrator([*rows, row("A", judge={"calibrated": True})])
    with pytest.raises(InputError, match="alike"):
        evaluate.fit_calibrator([*rows, row("A", judge={"model": "another"})])


def test_failures_and_unread_verdicts_are_wrong_and_counted(tmp_path):
    rows = [row("A"), row(None), {key: value for key, value in row("A").items() if key in ("id", "pair")}]
    rows[2]["error"] = "too long"
    result = evaluate.score("pairs", [write(tmp_path / "judged.jsonl", rows)])
    assert values(result)["mean over pairs"] == pytest.approx(33.33) and result["failed"] == 1
    assert accuracy_row("x", rows)["accuracy"] == pytest.approx(33.33)


@pytest.mark.parametrize("bad", ['{"id": 1}', "[]", "no json", '{"id": "x", "pair": {"question": "q"}}'])
def test_a_file_that_is_not_judged_is_refused_by_row(tmp_path, bad):
    path = tmp_path / "judged.jsonl"
    path.write_text(json.dumps(row("A")) + "\n" + bad + "\n")
    with pytest.raises(InputError, match=r"judged.jsonl: row 2"):
        evaluate.score("pairs", [path])


# ---------------------------------------------------------------------------------- real slices, end to end


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model whose answer is one letter, with a prompt that is short."""
    place = make_checkpoint(tmp_path_factory.mktemp("evaluate") / "model", "llama2", max_positions=8192)
    (place / "judge_prompt.txt").write_text("{question}\nA: {response_a}\nB: {response_b}\nThe better one:")
    return place


def judged(name: str, source: Path, model: Path, out: Path, capsys) -> tuple[dict, list[dict]]:
    words = [
        "--bench",
        name,
        str(source),
        "--out",
        str(out),
        "--model",
        str(model),
        "--format",
        "label",
        "--json",
    ]
    assert exit_status(infer.main, words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert exit_status(infer.main, ["--score", name, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    return values(printed), [json.loads(line) for line in out.read_text().splitlines()]


@needs_data
def test_judgebench_end_to_end(model, tmp_path, capsys):
    """The table equals what plain counting makes of the judged file."""
    lines = sorted((DATA / "judgebench_claude.jsonl").read_text().splitlines(), key=len)[:12]
    source = tmp_path / "judgebench.jsonl"
    source.write_text("\n".join(lines) + "\n")
    found, rows = judged("judgebench", source, model, tmp_path / "out.jsonl", capsys)
    right, count = Counter(), Counter()
    for line, each in zip(map(json.loads, lines), rows, strict=True):
        kind = {"mm": "knowledge", "livebench-r": "reasoning", "livebench-m": "math", "livec": "coding"}
        domain = next(name for start, name in kind.items() if line["source"].startswith(start))
        assert [vote["order"] for vote in each["details"]] == ["AB", "BA"]
        verdicts = [vote["label"] for vote in each["details"]]  # already in the given order
        truth = line["label"][0]
        right[domain] += verdicts.count(truth) > verdicts.count(OTHER[truth])
        count[domain] += 1
    expected = {domain: round(100 * right[domain] / count[domain], 2) for domain in count}
    assert {name: value for name, value in found.items() if name in count} == expected
    assert found["mean over pairs (the benchmark's own)"] == round(100 * sum(right.values()) / 12, 2)
    macro = next(value for name, value in found.items() if "Overall" in name)
    assert macro == pytest.approx(sum(100 * right[d] / count[d] for d in count) / len(count), abs=0.01)


@needs_data
def test_rm_bench_end_to_end(model, tmp_path, capsys):
    prompts = json.loads((DATA / "rm-bench_chat_filtered.json").read_text())
    short = sorted(prompts, key=lambda each: len(str(each["chosen"])) + len(str(each["rejected"])))[:4]
    source = tmp_path / "chat_filtered.json"
    source.write_text(json.dumps(short))
    found, rows = judged("rm-bench", source, model, tmp_path / "out.jsonl", capsys)
    cells, following = defaultdict(list), iter(rows)
    for prompt, (i, j) in itertools.product(short, itertools.product(range(3), repeat=2)):
        each = next(following)
        assert each["pair"]["response_a"] == prompt["chosen"][i]
        assert each["pair"]["response_b"] == prompt["rejected"][j]
        cells[i, j].append(sum(vote["p_a"] for vote in each["details"]) / 2 > 0.5)
    mean = {cell: 100 * sum(hits) / len(hits) for cell, hits in cells.items()}
    assert len(rows) == 36 and all(len(hits) == 4 for hits in cells.values())
    assert found["chat"] == pytest.approx(sum(mean.values()) / 9, abs=0.01)
    for level, chosen in (
        ("easy", lambda i, j: i > j),
        ("normal", lambda i, j: i == j),
        ("hard", lambda i, j: i < j),
    ):
        expected = sum(value for cell, value in mean.items() if chosen(*cell)) / 3
        assert found[f"{level}, mean of the domains"] == pytest.approx(expected, abs=0.01)


def test_ppe_end_to_end(tmp_path, capsys):
    """A scoring judge's pick among the first k is the one with the highest score."""
    place = make_checkpoint(tmp_path / "model", num_labels=1, tie_embeddings=False)
    rng, lists = random.Random(1), []
    for number in range(6):
        texts = {f"response_{k + 1}": "It is " + " ".join(rng.choices("abcdef", k=4)) for k in range(8)}
        asked = {"question_id": f"q{number}", "model_name": "m", "prompt": f"What is {number}?"}
        lists.append(asked | texts | {"scores": [rng.random() < 0.5 for _ in range(8)]})
    source, out = write(tmp_path / "ppe.jsonl", lists), tmp_path / "out.jsonl"
    words = ["--bench", "ppe", str(source), "--out", str(out), "--model", str(place), "--json"]
    assert exit_status(infer.main, words) == 0
    found = values(json.loads(capsys.readouterr().out))
    judge = RewardModel.load(place)
    for k in (1, 2, 4, 8):
        hits = 0
        for each in lists:
            turns = [("user", each["prompt"])]
            ids = [judge.tokenizer.example(turns, each[f"response_{i + 1}"])[0] for i in range(k)]
            scores = judge.scores(ids)
            hits += each["scores"][scores.index(max(scores))]
        assert found[f"best of {k}"] == round(100 * hits / 6, 2)
    assert exit_status(infer.main, words) == 0  # nothing is judged again
    assert len(out.read_text().splitlines()) == 6


def test_helpsteer3_end_to_end(model, tmp_path, capsys):
    """By domain; ties are no pairs."""
    rows = []
    for number, preference in enumerate((-3, 0, 2, 1)):
        context = [{"role": "user", "content": f"What is {number}?"}]
        asked = {"domain": ("stem", "code")[number % 2], "language": "english", "context": context}
        answers = {"response1": f"It is {number}.", "response2": "No idea."}
        rows.append(asked | answers | {"overall_preference": preference, "individual_preference": []})
    out = tmp_path / "out.jsonl"
    found, lines = judged("helpsteer3", write(tmp_path / "validation.jsonl", rows), model, out, capsys)
    hits = [line["label"] == line["pair"]["label"] for line in lines]
    assert [line["pair"]["label"] for line in lines] == ["A", "B", "B"] and len(found) == 4
    assert found["stem"] == 100 * sum(hits[:2]) / 2 and found["code"] == 100 * hits[2]
    assert found["mean of 2 domains"] == (found["stem"] + found["code"]) / 2
