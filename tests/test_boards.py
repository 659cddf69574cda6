"""RewardBench, its second version, LLMBar and RMB: our readers and scores beside their authors' rules.

The rules are written out here once more, slowly, from what the authors publish; the package `rewardbench` is
asked itself where it is installed (its arithmetic alone: what it depends on is not needed). LLMBar's authors
publish every judgment, and what they came to.
"""

import ast
import importlib.util
import json
import math
import os
import random
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from checkpoints import make_checkpoint
from endpoints import GOOD, Endpoint

from gramr2.commands import infer
from gramr2.extras import datasets, evaluate
from gramr2.files import InputError, exit_status
from gramr2.judge import RewardModel
from gramr2.records import Judgment, Pair, Vote

DATA = Path(os.environ.get("GRAMR2_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
NOTHING = {"A": 0, "B": 0, "none": 0}


def values(result) -> dict[str, float]:
    return {each["name"]: each["value"] for each in result["averages"]}


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judged(name: str, files: list[Path], judge) -> dict:
    """The table of published files, each of whose pairs is judged by a function."""
    rows = []
    for pair in (pair for path in files for pair in evaluate.read_benchmark(name, path)):
        rows.append({"id": pair.id, "pair": pair.to_json(), **judge(pair).to_json()})
    return evaluate.score(name, [write(files[0].with_suffix(".judged.jsonl"), rows)])


def by_scores(scores: dict[str, float]):
    def judge(pair: Pair) -> Judgment:
        a, b = scores[pair.response_a], scores[pair.response_b]
        label = None if a == b else "A" if a > b else "B"
        return Judgment(label, 1 / (1 + math.exp(b - a)), NOTHING, scores=(a, b))

    return judge


def by_votes(rng: random.Random, said: dict):
    """Anything, in each of the two orders; `said` keeps it, in the pair's order."""

    def judge(pair: Pair) -> Judgment:
        labels = said[pair.response_a, pair.response_b] = rng.choices(["A", "B", None], [5, 4, 1], k=2)
        chance = {"A": 0.9, "B": 0.1, None: None}
        return Judgment.from_votes(
            [Vote(one, order, chance[one]) for one, order in zip(labels, ("AB", "BA"), strict=True)]
        )

    return judge


def always_first(pair: Pair) -> Judgment:
    return Judgment.from_votes([Vote("A", "AB", 0.9), Vote("B", "BA", 0.1)])


def percent(value: float) -> float:
    return round(100 * value, 2)


# ---------------------------------------------------------------------------------- RewardBench


def rewardbench_rows(rng, count):
    subsets = [name for section in datasets.REWARDBENCH.values() for name in section]
    for n in range(count):
        subset = subsets[n % len(subsets)] if n < 100 else rng.choice(subsets)
        yield {"id": n, "subset": subset, "prompt": "q", "chosen": f"{n} +", "rejected": f"{n} -"}


def package(*names: str) -> dict:
    """Functions and tables of the package `rewardbench`, without its imports."""
    found = importlib.util.find_spec("rewardbench")
    if found is None:
        pytest.skip("the package is not there: pip install --no-deps rewardbench")

    class Dataset(list):
        column_names = ()
        from_dict = classmethod(lambda cls, rows: cls())
        add_column = lambda self, *_: self  # noqa: E731

    typing = {name: __import__("typing").__dict__[name] for name in ("Dict", "List", "Tuple")}
    known = {"np": np, "math": math, "defaultdict": defaultdict, "Dataset": Dataset, **typing}
    for path in (Path(found.origin).with_name(name) for name in ("constants.py", "utils.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = getattr(node, "name", "") or getattr(getattr(node, "targets", [None])[0], "id", "")
            if name in names:
                exec(compile(ast.Module([node], []), str(path), "exec"), known)
    return known


def test_rewardbench_weighs_subsets_in_sections(tmp_path):
    """Scores: the higher one, strictly. Votes: what an order that chance draws gives on average."""
    rng, rows = random.Random(1), list(rewardbench_rows(random.Random(0), 1000))
    scores = {row[name]: rng.randrange(6) for row in rows for name in ("chosen", "rejected")}
    said: dict = {}
    path = write(tmp_path / "filtered.jsonl", rows)
    by = {"scores": judged("rewardbench", [path], by_scores(scores))}
    by["votes"] = judged("rewardbench", [path], by_votes(rng, said))
    for kind, result in by.items():
        right = defaultdict(list)
        for row in rows:
            worth = float(scores[row["chosen"]] > scores[row["rejected"]])
            if kind == "votes":
                worth = fmean(
                    {"A": 1, "B": 0, None: 0.5}[one] for one in said[row["chosen"], row["rejected"]]
                )
            right[row["subset"]].append(worth)
        sections = []
        for section, counts in datasets.REWARDBENCH.items():
            total = sum(fmean(right[subset]) * count for subset, count in counts.items())
            sections.append(total / sum(counts.values()))
            assert values(result)[section] == percent(sections[-1])
        assert values(result)["mean of the four sections (the benchmark's Score)"] == percent(fmean(sections))
        assert all(values(result)[subset] == percent(fmean(each)) for subset, each in right.items())
    assert values(judged("rewardbench", [path], always_first))["Chat Hard"] == 50


def test_rewardbench_is_the_packages_own(tmp_path):
    theirs = package("EXAMPLE_COUNTS", "SUBSET_MAPPING", "calculate_scores_per_section")
    counts, sections = theirs["EXAMPLE_COUNTS"], theirs["SUBSET_MAPPING"]
    assert {
        name: {one: counts[one] for one in each} for name, each in sections.items()
    } == datasets.REWARDBENCH
    rng, rows = random.Random(2), list(rewardbench_rows(random.Random(3), 1000))
    scores = {row[name]: rng.random() for row in rows for name in ("chosen", "rejected")}
    right = defaultdict(list)
    for row in rows:
        right[row["subset"]].append(scores[row["chosen"]] > scores[row["rejected"]])
    expected = theirs["calculate_scores_per_section"](
        counts, sections, {k: fmean(v) for k, v in right.items()}
    )
    found = values(judged("rewardbench", [write(tmp_path / "filtered.jsonl", rows)], by_scores(scores)))
    assert {name: found[name] for name in expected} == {
        name: percent(each) for name, each in expected.items()
    }


# ---------------------------------------------------------------------------------- RewardBench 2


def rewardbench2_rows(rng, fours, ties):
    for n in range(fours):
        about = {"id": str(n), "subset": datasets.REWARDBENCH2[n % 5], "prompt": "q", "num_correct": 1}
        yield about | {"chosen": [f"{n} +"], "rejected": [f"{n} -{k}" for k in range(3)]}
    for n in range(ties):
        for kind, count in (("ref", 1), ("tied", rng.randint(2, 6))):
            about = {"id": f"{kind}:{n}", "subset": "Ties", "prompt": "q", "num_correct": count}
            right, wrong = ([f"{kind}{n} {sign}{k}" for k in range(6)] for sign in "+-")
            yield about | {"chosen": right[:count], "rejected": wrong[: rng.randint(1, 6)]}


def ties_by_the_rule(rows, scores) -> float:
    """The authors' newest code, a line for each of its terms."""
    score = {row["id"]: [scores[one] for one in row["chosen"] + row["rejected"]] for row in rows}
    count = {row["id"]: row["num_correct"] for row in rows}
    gap = {name: min(all_[: count[name]]) - max(all_[count[name] :]) for name, all_ in score.items()}
    spread = {name: max(all_[: count[name]]) - min(all_[: count[name]]) for name, all_ in score.items()}
    numbers = sorted({name.split(":")[1] for name in score})
    tied, reference, preferred, hard, ratio = [], [], [], [], []
    for number in numbers:
        one, many = f"ref:{number}", f"tied:{number}"
        least = min(gap[one], gap[many])
        reference.append(gap[one] > 0)
        tied.append(gap[many] > 0)
        preferred.append(gap[many] > spread[many])
        hard.append(least > spread[many])
        if spread[many]:
            ratio.append(math.tanh(least / spread[many] - 1))
        else:
            ratio.append(math.copysign(1, least) if least else 0.0)
    terms = (tied, 0.3), (reference, 0.3), (preferred, 0.2), (hard, 0.2), (ratio, 0.01)
    return sum(weight * fmean(each) for each, weight in terms)


@pytest.mark.parametrize("draw", ["coarse", "fine"])
def test_rewardbench2_by_scores(draw, tmp_path):
    """Coarse scores are level often: the best of four then shares, and a spread of correct answers is 0."""
    rng, rows = random.Random(4), list(rewardbench2_rows(random.Random(5), 800, 200))
    texts = [text for row in rows for text in row["chosen"] + row["rejected"]]
    scores = {text: rng.gauss(2 * (" +" in text), 1) for text in texts}
    scores = {text: float(round(each)) if draw == "coarse" else each for text, each in scores.items()}
    result = judged("rewardbench2", [write(tmp_path / "test.jsonl", rows)], by_scores(scores))
    expected = defaultdict(list)
    for row in rows[:800]:
        four = [scores[one] for one in row["chosen"] + row["rejected"]]
        share = 1 / four.count(max(four)) if four[0] == max(four) else 0
        expected[row["subset"]].append(share)
    means = {name: fmean(each) for name, each in expected.items()}
    means["Ties"] = ties_by_the_rule(rows[800:], scores)
    assert {name: values(result)[name] for name in means} == {
        name: percent(each) for name, each in means.items()
    }
    assert values(result)["mean of the six domains (the authors' score)"] == percent(fmean(means.values()))


def test_rewardbench2s_ties_are_the_packages_own(tmp_path):
    """Version 0.1.4; where no two correct answers score the same, the newest code is it too."""
    theirs = package("sample_stats", "_compute_prompt_stats", "process_single_model")
    rng, rows = random.Random(6), list(rewardbench2_rows(random.Random(7), 0, 500))
    scores = {one: rng.gauss(2 * (" +" in one), 1) for row in rows for one in row["chosen"] + row["rejected"]}
    given = theirs["Dataset"](
        {"id": row["id"], "num_correct": row["num_correct"]}
        | {"scores": [scores[one] for one in row["chosen"] + row["rejected"]]}
        for row in rows
    )
    _, expected = theirs["process_single_model"](given)
    found = values(judged("rewardbench2", [write(tmp_path / "test.jsonl", rows)], by_scores(scores)))
    assert found["Ties"] == percent(expected)


def test_rewardbench2_by_pairs(tmp_path):
    """All three have to be won, by both orders together; who takes the first has what chance has."""
    rng, rows, said = random.Random(8), list(rewardbench2_rows(random.Random(9), 800, 50)), {}
    path = write(tmp_path / "test.jsonl", rows)
    result = judged("rewardbench2", [path], by_votes(rng, said))
    expected, ties = defaultdict(list), {}
    for row in rows:
        duels = [said[one, other] for one in row["chosen"] for other in row["rejected"]]
        leads = [each.count("A") - each.count("B") for each in duels]
        if row["subset"] == "Ties":
            ties[row["id"]] = all(lead > 0 for lead in leads)
        else:
            level = sum(lead == 0 for lead in leads)
            expected[row["subset"]].append(0 if min(leads) < 0 else 1 / (1 + level))
    means = {name: fmean(each) for name, each in expected.items()} | {"Ties": fmean(ties.values())}
    assert {name: values(result)[name] for name in means} == {
        name: percent(each) for name, each in means.items()
    }
    whole = values(result)["mean of the six domains (of Ties the accuracy alone)"]
    assert whole == percent(fmean(means.values())) and "no margins" in result["more"]
    first = values(judged("rewardbench2", [path], always_first))
    assert first["Math"] == 25 and first["Ties"] == 0


def test_a_prompt_without_all_of_its_pairs_is_left_out_and_a_failure_is_lost(tmp_path):
    rows = list(rewardbench2_rows(random.Random(0), 2, 1))
    rows = [row | {"subset": "Math"} if row["subset"] != "Ties" else row for row in rows]
    scores = {one: float(" +" in one) for row in rows for one in row["chosen"] + row["rejected"]}
    path = write(tmp_path / "test.jsonl", rows)
    judged("rewardbench2", [path], by_scores(scores))
    lines = [json.loads(line) for line in path.with_suffix(".judged.jsonl").read_text().splitlines()]
    assert values(evaluate.score("rewardbench2", [write(path, lines)]))["Ties"] == 101  # as the authors' own
    cut = evaluate.score("rewardbench2", [write(path, lines[1:])])
    assert values(cut)["Math"] == 100 and "1 prompts without all" in cut["more"]
    failed = [{"id": each["id"], "pair": each["pair"], "error": "too long"} for each in (lines[0], lines[-1])]
    found = values(evaluate.score("rewardbench2", [write(path, [failed[0], *lines[1:-1], failed[1]])]))
    assert found["Math"] == 50 and found["Ties"] == 29  # of Ties the reference alone


# ---------------------------------------------------------------------------------- LLMBar


def test_llmbar_is_the_mean_of_the_two_orders(tmp_path):
    rng, said, right, files = random.Random(10), {}, {}, []
    for subset in datasets.LLMBAR:
        place = tmp_path / ("Natural" if subset == "Natural" else f"Adversarial/{subset}")
        texts = [(f"{subset} {n}", f"{subset} {n}'") for n in range(200)]
        rows = [{"input": "q", "output_1": a, "output_2": b, "label": rng.choice((1, 2))} for a, b in texts]
        files.append(place / "dataset.json")
        write(place / "evaluators/GPT-4/result.json", [{"not": "a pair"}])
        files[-1].write_text(json.dumps(rows))
        right[subset] = rows
    result = judged("llmbar", [tmp_path], by_votes(rng, said))
    accuracy = {}
    for subset, rows in right.items():
        hits = [said[r["output_1"], r["output_2"]].count("AB"[r["label"] - 1]) / 2 for r in rows]
        accuracy[subset] = fmean(hits)
    found = values(result)
    assert {name: found[name] for name in accuracy} == {
        name: percent(each) for name, each in accuracy.items()
    }
    assert found["mean of the five subsets (the paper's Average)"] == percent(fmean(accuracy.values()))
    del accuracy["Natural"]
    assert found["mean of the adversarial subsets"] == percent(fmean(accuracy.values()))
    level = by_scores(dict.fromkeys((text for pair in said for text in pair), 1.0))
    assert values(judged("llmbar", [files[0]], level))["Natural"] == 50


LLMBAR = DATA / "LLMBar/Dataset/LLMBar"


@pytest.mark.skipif(not LLMBAR.is_dir(), reason=f"no clone of princeton-nlp/LLMBar as {DATA / 'LLMBar'}")
def test_llmbars_published_judgments_come_to_its_published_figures():
    """Each of its evaluators on each subset, to the digit."""
    files = sorted(LLMBAR.rglob("result.json"))
    assert len(files) > 300
    for path in files:
        source, rows = datasets.Source(path.parents[3] / "dataset.json"), []
        for row in json.loads(path.read_text(encoding="utf-8")):
            (pair,) = datasets.DATASETS["llmbar"].items(row, source)
            said = (row["results"][-1][f"swap = {swapped}"]["winner"] for swapped in (False, True))
            labels = [{"1": "A", "2": "B"}.get(one) for one in said]
            details = [{"order": o, "label": one} for o, one in zip(("AB", "BA"), labels, strict=True)]
            rows.append({"pair": pair.to_json(), "details": details})
        said = json.loads(path.with_name("statistics.json").read_text())["correct_average"]
        assert evaluate.llmbar(rows)[0][0]["value"] == round(float(said.rstrip("%")), 2), path


# ---------------------------------------------------------------------------------- RMB


def rmb_row(n: int, goal: str, others: int) -> dict:
    asked = [{"role": "user", "content": "q", "language": "English"}]
    answers = [{"llm_name": "m", "answer": f"{n} {k}"} for k in range(1 + (others or 1))]
    kind = "BoN_set" if others else "Pairwise_set"
    about = {"conversation_input": asked, "category_path": f"{kind}/{goal}/Code"}
    if others:
        return about | {"bon_uid": str(n), "bon_best": answers[0], "loser_list": answers[1:]}
    return about | {"pair_uid": str(n), "chosen": answers[0], "reject": answers[1]}


@pytest.mark.parametrize("kind", ["scores", "votes"])
def test_rmb_has_four_sets_and_a_list_is_won_whole_or_not_at_all(kind, tmp_path):
    rng, said = random.Random(11), {}
    goals = ("Helpfulness", "Harmlessness")
    rows = [rmb_row(n, goals[n % 2], (n // 2 % 2) * rng.randint(2, 5)) for n in range(1000)]
    scores = {f"{n} {k}": rng.randrange(8) for n in range(1000) for k in range(6)}
    write(tmp_path / "sets/one.jsonl", rows[:500])
    (tmp_path / "sets/two.json").write_text(json.dumps(rows[500:]))
    judge = by_scores(scores) if kind == "scores" else by_votes(rng, said)
    result = judged("rmb", [tmp_path / "sets"], judge)
    won = defaultdict(list)
    for n, row in enumerate(rows):
        others = range(1, 1 + len(row.get("loser_list", [1])))
        if kind == "scores":
            all_won = all(scores[f"{n} 0"] > scores[f"{n} {k}"] for k in others)
        else:
            duels = [said[f"{n} 0", f"{n} {k}"] for k in others]
            all_won = all(each.count("A") > each.count("B") for each in duels)
        won[f"{goals[n % 2]}, {'best of n' if 'bon_uid' in row else 'pairs'}"].append(all_won)
    means = {name: fmean(each) for name, each in won.items()}
    assert len(means) == 4
    assert {name: values(result)[name] for name in means} == {
        name: percent(each) for name, each in means.items()
    }
    assert values(result)["mean of the four sets (the paper's Overall)"] == percent(fmean(means.values()))


# ---------------------------------------------------------------------------------- files, and judges

TIE = {
    "id": "tied:1",
    "subset": "Ties",
    "prompt": "q",
    "chosen": ["a", "b"],
    "rejected": ["c"],
    "num_correct": 2,
}
BAD = [
    ("rewardbench", {"id": 1, "subset": "chat", "prompt": "q", "chosen": "a", "rejected": "b"}, "subset"),
    ("rewardbench", {"id": 1, "subset": "hep-go", "prompt": "q", "chosen": ["a"], "rejected": "b"}, "chosen"),
    ("rewardbench2", TIE | {"subset": "Tie"}, "subset"),
    ("rewardbench2", TIE | {"id": "1"}, "neither ref"),
    ("rewardbench2", TIE | {"num_correct": 3}, "no wrong one"),
    ("rewardbench2", TIE | {"chosen": ["a", 1]}, "chosen"),
    ("rewardbench2", TIE | {"subset": "Math", "rejected": [], "chosen": ["a"]}, "no wrong one"),
    ("llmbar", {"input": "q", "output_1": "a", "output_2": "b", "label": 0}, "label"),
    ("rmb", rmb_row(1, "Helpfulness", 2) | {"loser_list": []}, "loser_list"),
    ("rmb", rmb_row(1, "Honesty", 2), "category_path"),
    ("rmb", rmb_row(1, "Helpfulness", 0) | {"conversation_input": "q"}, "conversation_input"),
]


@pytest.mark.parametrize(("name", "row", "said"), BAD)
def test_a_malformed_row_of_a_board_is_an_error(name, row, said, tmp_path):
    path = write(tmp_path / "Natural/dataset.jsonl", [row])
    with pytest.raises(InputError, match=f"line 1.*{said}"):
        list(evaluate.read_benchmark(name, path))
    with pytest.raises(InputError, match="1 of 1 rows"):
        datasets.convert(name, path, tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["rewardbench", "rewardbench2", "rmb"])
def test_other_rows_than_a_boards_are_refused_and_so_is_one_order(name, tmp_path):
    pair = Pair((("user", "q"),), "a", "b", "A", domain="math")
    row = {"id": pair.id, "pair": pair.to_json(), **Judgment("A", 0.9, NOTHING).to_json()}
    with pytest.raises(InputError, match=r"not rows of|no row is of"):
        evaluate.score(name, [write(tmp_path / "other.jsonl", [row])])
    row |= Judgment.from_votes([Vote("A", "AB", 0.9)]).to_json()
    with pytest.raises(InputError, match="needs both"):
        evaluate.score(name, [write(tmp_path / "one.jsonl", [row])])


def test_boards_are_converted_whole_and_known_to_training_data(tmp_path):
    """Every pair is there, and known where training data is kept apart from benchmarks."""
    shared = " ".join(f"word{n}" for n in range(20))
    files = {
        "rewardbench": rewardbench_rows(random.Random(0), 3),
        "rewardbench2": [TIE],
        "rmb": [rmb_row(1, "Harmlessness", 3)],
    }
    counts = {"rewardbench": 3, "rewardbench2": 2, "rmb": 3}
    for name, rows in files.items():
        rows = [json.loads(json.dumps(row).replace('"q"', f'"{shared}"')) for row in rows]
        path, out = write(tmp_path / f"{name}.jsonl", rows), tmp_path / f"{name}.out.jsonl"
        account = datasets.convert(name, path, out)
        assert account.kept.total() == counts[name] == len(out.read_text().splitlines())
        train = write(tmp_path / "train.jsonl", [{"prompt": f"So {shared}?", "chosen": "x", "rejected": "y"}])
        with pytest.raises(InputError, match=f"overlap with {name}"):
            datasets.convert("pairs", train, tmp_path / "pairs.jsonl", [path])
    with pytest.raises(InputError, match="says none of Natural"):
        list(evaluate.read_benchmark("llmbar", write(tmp_path / "x/dataset.jsonl", [{}])))


def bench(name: str, source: Path, out: Path, capsys, *words: str) -> dict[str, float]:
    assert exit_status(infer.main, ["--bench", name, str(source), "--out", str(out), "--json", *words]) == 0
    printed = capsys.readouterr().out
    assert exit_status(infer.main, ["--score", name, str(out), "--json"]) == 0
    assert capsys.readouterr().out == printed
    return values(json.loads(printed))


def test_a_scoring_judge_end_to_end_is_scored_by_its_own_scores(tmp_path, capsys):
    """What it gives each response alone makes the table: no probability stands between."""
    place = make_checkpoint(tmp_path / "model", num_labels=1, tie_embeddings=False)
    rows = list(rewardbench2_rows(random.Random(1), 5, 3))
    found = bench("rewardbench2", write(tmp_path / "test.jsonl", rows), tmp_path / "out.jsonl", capsys,
                  "--model", str(place))  # fmt: skip
    judge = RewardModel.load(place)
    scores = {
        one: judge.score((("user", "q"),), one) for row in rows for one in row["chosen"] + row["rejected"]
    }
    for row in rows[:5]:
        four = [scores[one] for one in row["chosen"] + row["rejected"]]
        assert found[row["subset"]] == (100 / four.count(max(four)) if four[0] == max(four) else 0)
    assert found["Ties"] == percent(ties_by_the_rule(rows[5:], scores))


@pytest.mark.parametrize("path", ["v1/classify#some", "v1#some"])
@pytest.mark.parametrize("name", ["rewardbench", "rewardbench2", "llmbar", "rmb"])
def test_a_judge_elsewhere_that_is_always_right_has_every_point(name, path, tmp_path, capsys):
    rows = {
        "rewardbench": list(rewardbench_rows(random.Random(0), 23)),
        "rewardbench2": list(rewardbench2_rows(random.Random(0), 5, 1)),
        "llmbar": [{"input": "q", "output_1": "-", "output_2": "+", "label": 2}],
        "rmb": [
            rmb_row(n, goal, others)
            for n, (goal, others) in enumerate([("Helpfulness", 2), ("Harmlessness", 0)])
        ],
    }[name]
    written = json.dumps(rows).replace("+", GOOD)
    for n in range(2):
        written = written.replace(f'"{n} 0"', f'"{GOOD} {n}"')
    source = tmp_path / "Manual/dataset.json"
    source.parent.mkdir()
    source.write_text(written)
    with Endpoint() as server:
        words = ["--model", f"{server.base}/{path}"]
        found = bench(name, source, tmp_path / "out.jsonl", capsys, *words)
    assert all(100 <= each <= 101 for each in found.values()), found
