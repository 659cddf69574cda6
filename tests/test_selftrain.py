"""selftrain.py where it is killed, spread over ranks, given other data, or given what it cannot use."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from selfruns import ROOT, Forks, finished_micro, same_results, small_world

from gramr2.extras import datasets
from gramr2.extras.toyworld import SHIPPED, WorldConfig, good_names, make_pair

KILL = ["--no-baselines"]  # their steps are of the same kinds as the others


@pytest.fixture(scope="module")
def forks():
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> Path:
    return finished_micro(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def small(micro, tmp_path_factory) -> Path:
    """A recipe for a run of seconds, from the models that the micro run has trained."""
    return small_world(micro, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def whole(forks, small, tmp_path_factory) -> Path:
    """The small run, uninterrupted."""
    place = tmp_path_factory.mktemp("whole")
    done = forks.run(place, ["--recipe", small, *KILL])
    assert done["statuses"] == [0], done["logs"]
    (place / "seconds").write_text(str(done["seconds"]))
    return place


def errors(result: dict) -> list[str]:
    """The error lines of all ranks, once each is known not to be a traceback."""
    assert not [log for log in result["logs"] if "Traceback" in log], result["logs"]
    return [line for log in result["logs"] for line in log.splitlines() if line.startswith("error: ")]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def step(place: Path, name: str) -> Path:
    (found,) = place.glob(f"runs/small/steps/*-{name}")
    return found


# ---------------------------------------------------------------------------------- kill -9 and go on


def test_killed_before_and_after_every_publication_it_goes_on_to_the_same_results(
    forks, small, whole, tmp_path
):
    """Level 1. Every start but the last is killed around the next thing that is published.

    What a start publishes again, such as the files at the end, is passed over after its two kills.
    """
    kills, n, left, statuses = 0, 1, [], []
    while kills < 400 and 0 not in statuses:
        words = ["--recipe", small, *KILL]
        statuses = [forks.run(tmp_path, words, kill=[when, n])["statuses"][0] for when in ("before", "after")]
        kills += statuses.count(-9)
        before, left = left, sorted(path for path in tmp_path.rglob("*") if ".tmp-" not in str(path))
        n = n + 1 if left == before else 1
    assert statuses == [0, 0] and kills >= int((whole / "publications").read_text())
    assert same_results(whole / "runs/small", tmp_path / "runs/small")
    left = [*tmp_path.rglob("*.claim"), *tmp_path.rglob(".*.tmp-*")]
    assert not left


def test_killed_at_five_moments_it_goes_on_to_the_same_results(forks, small, whole, tmp_path):
    """Level 1; a kill may come in the middle of a training step, of a write, or of an import."""
    rng, whole_seconds = random.Random(1), json.loads((whole / "seconds").read_text())
    for _ in range(5):
        forks.run(tmp_path, ["--recipe", small, *KILL], kill_after=rng.uniform(0.3, 0.5) * whole_seconds)
    done = forks.run(tmp_path, ["--recipe", small, *KILL])
    assert done["statuses"] == [0], done["logs"]
    assert same_results(whole / "runs/small", tmp_path / "runs/small")


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(forks, small, whole, tmp_path):
    for n in (1, 4, 9, 17):
        done = forks.run(tmp_path, ["--recipe", small, *KILL], kill=["full", n])
        (error,) = errors(done)
        assert done["statuses"] == [2] and "No space left" in error and "run" in error
    assert forks.run(tmp_path, ["--recipe", small, *KILL])["statuses"] == [0]
    assert same_results(whole / "runs/small", tmp_path / "runs/small")


# ---------------------------------------------------------------------------------- ranks


def test_two_ranks_sample_and_filter_what_one_does_and_a_dead_one_ends_both(forks, small, tmp_path):
    """Level 1: a shard's rows do not know who wrote them. A rank that waits for ever would hold a node."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    words = ["--recipe", small, "--until"]
    assert forks.run(one, [*words, "wrong-labels"], shard=4)["statuses"] == [0]
    shutil.copytree(one, two)
    assert forks.run(one, [*words, "filter-labelled"], shard=4)["statuses"] == [0]
    died = forks.run(two, [*words, "filter-labelled"], shard=4, ranks=2, die=[1, 2])
    assert died["statuses"][1] == -9 and died["statuses"][0] not in (0, -9) and died["seconds"] < 60
    done = forks.run(two, [*words, "filter-labelled"], shard=4, ranks=2)
    assert done["statuses"] == [0, 0], done["logs"]
    for name, file in (
        ("prove-labelled", "proofs"),
        ("filter-labelled", "kept"),
        ("filter-labelled", "dropped"),
    ):
        assert (step(one, name) / f"{file}.jsonl").read_bytes() == (
            step(two, name) / f"{file}.jsonl"
        ).read_bytes()
    # Only the first rank speaks, and says a thing once.
    assert done["logs"][1].strip() == "" and done["logs"][0].count("stopped after") == 1


def test_torchrun_runs_the_whole_loop(small, whole, tmp_path):
    """The command line of the documentation; level 2 against one rank: weights differ by rounding."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        str(ROOT / "selftrain.py"),
    ]
    command += ["--recipe", str(small), "--iters", "1", *KILL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: ") == 1 and done.stdout.count("round 1 ") >= 1
    ours, theirs = (json.loads((p / "runs/small/results.json").read_text()) for p in (tmp_path, whole))
    assert [row["name"] for row in ours["rows"]] == [row["name"] for row in theirs["rows"]]
    losses = [
        [row["loss"] for row in read(step(place, "prover") / "metrics.jsonl")] for place in (tmp_path, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


# ---------------------------------------------------------------------------------- what it cannot use


def test_a_round_that_keeps_nothing_says_which_filter_took_it_and_keeps_the_last_model(
    forks, small, tmp_path
):
    done = forks.run(tmp_path, ["--recipe", small, "--softmax", "1.0"])
    (error,) = errors(done)
    assert done["statuses"] == [2] and "round-1-labels" in error and "softmax" in error
    root = tmp_path / "runs/small"
    results = json.loads((root / "results.json").read_text())
    assert results["stopped"] in error and [row["name"] for row in results["rows"]] == ["backbone", "initial"]
    assert (root / results["model"] / "model.safetensors").is_file() and "initial" in results["model"]
    assert (
        results["rounds"][0]["kept"] == 0
        and (root / "report.html").is_file()
        and "initial" in done["logs"][0]
    )


def test_a_prover_that_writes_no_eligible_proof_is_said_with_what_to_do(forks, small, tmp_path):
    done = forks.run(tmp_path, ["--recipe", small, "--proof-tokens", "2"])
    (error,) = errors(done)
    assert done["statuses"] == [2] and "no eligible proof" in error and "unfinished" in error
    assert "--proof-tokens" in error


def test_unlabelled_pairs_that_are_known_already_are_dropped_and_counted(forks, small, micro, tmp_path):
    """A test pair among the unlabelled ones would be judged, and learnt from, before the test."""
    place = micro / "steps/01-world"
    rows = {name: read(place / f"{name}.jsonl") for name in ("human", "labelled", "unlabelled", "test")}
    test = rows["test"][:6]
    turned = {
        **test[0],
        "response_a": test[0]["response_b"],
        "response_b": test[0]["response_a"],
        "label": None,
    }
    extra = [turned, test[1], rows["human"][0], rows["labelled"][0], rows["unlabelled"][0]]
    files = {
        "human": rows["human"],
        "labelled": [*rows["labelled"], test[2]],
        "unlabelled": [*rows["unlabelled"], *extra],
        "test": test,
    }
    words = ["--recipe", small, "--until", "data"]
    for name, chosen in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        words += [f"--{name}", tmp_path / f"{name}.jsonl"]
    assert forks.run(tmp_path, words)["statuses"] == [0]
    counts = json.loads((step(tmp_path, "data") / "done.json").read_text())["counts"]
    assert counts["unlabelled, known already"] == 5 and counts["labelled, known already"] == 1
    held, batch = (read(step(tmp_path, "data") / f"{name}.jsonl") for name in ("test", "unlabelled-1"))
    assert not {row["id"] for row in held} & {row["id"] for row in batch}
    assert not [row for row in batch if {"label", "rationale", "margin"} & row.keys()]
    refused = forks.run(tmp_path, [*words, "--pool", "1000", "--name", "small2"])
    assert refused["statuses"] == [2] and "--pool" in errors(refused)[0]


def test_a_tokenizer_whose_verdicts_are_not_letters_of_their_own_is_refused_at_the_start(
    forks, small, tmp_path
):
    text = Path(small).read_text()
    backbone = Path(text.partition('backbone = "')[2].partition('"')[0])
    spoilt = shutil.copytree(backbone, tmp_path / "spoilt")
    raw = json.loads((spoilt / "tokenizer.json").read_text())
    token = dict(
        raw["added_tokens"][-1], id=1 + max(t["id"] for t in raw["added_tokens"]), content="A\n</answer>"
    )
    raw["added_tokens"].append(token | {"special": False})
    (spoilt / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "small.toml").write_text(text.replace(str(backbone), str(spoilt)))
    done = forks.run(tmp_path, ["--recipe", tmp_path / "small.toml"])
    (error,) = errors(done)
    assert done["statuses"] == [2] and "letters" in error and "spoilt" in error
    assert not list(tmp_path.glob("runs/small/steps/*"))


# ---------------------------------------------------------------------------------- other data


def four_files(place: Path, rows: dict[str, list[dict]]) -> list:
    """The words that name a world of four files."""
    words = []
    for name, chosen in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        words += [f"--{name}", place / f"{name}.jsonl"]
    return words


def test_any_world_of_four_files_starts_from_the_shipped_backbone_if_it_has_the_words(forks, tmp_path):
    """The default recipe. Words that the backbone cannot read are refused by file, row and word."""
    assert (SHIPPED / "config.json").is_file()
    names = good_names(WorldConfig().goods)[:6]
    prices = {name: n + 1 for n, name in enumerate(names)}
    rng = random.Random(0)
    pairs = [make_pair(tuple(rng.sample(names, 3)), prices, rng, "human") for _ in range(60)]
    rows = [pair.to_json() for pair in {pair.id: pair for pair in pairs}.values()]
    kinds = ("human", "labelled", "unlabelled", "test")
    files = {kind: rows[n::4] for n, kind in enumerate(kinds)}
    words = ["--iters", "1", "--until", "test-backbone", "--test-limit", "4"]
    done = forks.run(tmp_path, [*four_files(tmp_path, files), *words])
    assert done["statuses"] == [0], done["logs"]
    plan = json.loads((tmp_path / "runs/toy/plan.json").read_text())
    assert "toy_backbone" in plan["settings"]["from"]["backbone"]
    files["labelled"][2]["response_b"] = "dog 4."
    done = forks.run(tmp_path, [*four_files(tmp_path, files), *words, "--name", "other"])
    (error,) = errors(done)
    assert done["statuses"] == [2] and "labelled.jsonl: row 3:" in error and "'dog'" in error
    some = forks.run(tmp_path, ["--human", tmp_path / "human.jsonl"])
    assert some["statuses"] == [2] and "--labelled, --unlabelled, --test" in errors(some)[0]


PUBLISHED = """
[models]
backbone = "{place}/judge"
prover = "{place}/prover"

[data]
human = ["human.jsonl"]
labelled = ["labelled.jsonl"]
unlabelled = ["unlabelled.jsonl"]
test = ["test.jsonl"]

[selftrain]
iters = 1
k = 2
votes = 2
test_votes = 2
proof_tokens = 256
judge_tokens = 256
confidence = 0.0
without = ["agreement", "coherence", "states_label", "states_other"]  # a few steps teach the form alone
test_limit = 6
baselines = false

[train]
batch_size = 8
steps = 80
max_length = 400
token_budget = 6400
lr = 1e-2

[train.finetune]
steps = 4
"""


def published(place: Path) -> None:
    """Small files in the published schemas: HelpSteer3, Skywork-80K, Stack-Exchange, RM-Bench."""

    def turn(role: str, text: str) -> dict:
        return {"role": role, "content": text}

    with gzip.open(place / "train.jsonl.gz", "wt") as file:
        for n in range(24):
            better = 1 + n % 2
            said = {"score": (-2, 2)[n % 2], "feedback1": "Response 1 is short.",
                    "feedback2": "Response 2 is short.",
                    "reasoning": f"Response {better} is better than Response {3 - better}."}  # fmt: skip
            row = {"domain": "general", "language": "english", "context": [turn("user", f"add {n}?")],
                   "response1": f"a {n}", "response2": f"b {n}", "overall_preference": said["score"],
                   "individual_preference": [said]}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    with (place / "skywork.jsonl").open("w") as file:
        for n in range(24, 40):
            asked = turn("user", f"add {n}?")
            row = {"chosen": [asked, turn("assistant", f"a {n}")],
                   "rejected": [asked, turn("assistant", f"b {n}")], "source": "s"}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    with (place / "stack.jsonl").open("w") as file:
        for n in range(40, 56):
            answers = [{"text": f"<p>{letter} {n}</p>", "pm_score": "1"} for letter in "ab"]
            file.write(json.dumps({"qid": n, "question": f"<p>add {n}?</p>", "answers": answers}) + "\n")
    bench = [{"id": n, "prompt": f"add {n}?", "chosen": [f"a {n}{m}" for m in "xyz"],
              "rejected": [f"b {n}{m}" for m in "xyz"], "domain": "chat"} for n in range(2)]  # fmt: skip
    (place / "bench.json").write_text(json.dumps(bench))


def test_published_data_and_two_tokenizers_run_from_end_to_end(forks, tmp_path):
    """Qwen3's prover and LLaMA's judge share text and nothing else. Nobody types a word in between."""
    published(tmp_path)
    formats = {"helpsteer3": ("train.jsonl.gz", "human"), "skywork-80k": ("skywork.jsonl", "labelled")}
    formats |= {"stack-exchange": ("stack.jsonl", "unlabelled"), "rm-bench": ("bench.json", "test")}
    for name, (source, target) in formats.items():
        datasets.main([name, str(tmp_path / source), str(tmp_path / f"{target}.jsonl")])
    for name, family in (("judge", "llama3"), ("prover", "qwen3")):
        model = make_checkpoint(tmp_path / name, family)
        (model / "judge_prompt.txt").write_text("{question}\nA: {response_a}\nB: {response_b}")
        (model / "prover_prompt.txt").write_text(
            "Prove {label}. {question}\nA: {response_a}\nB: {response_b}"
        )
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("judge", "prover")]
    assert tokenizers[0] != tokenizers[1]
    (tmp_path / "published.toml").write_text(PUBLISHED.format(place=tmp_path))
    done = forks.run(tmp_path, ["--recipe", "published.toml"])
    assert done["statuses"] == [0], done["logs"][0][-3000:]
    results = json.loads((tmp_path / "runs/published/results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    assert names[-1] == "voting@2" and "round 1" in names and results["rounds"][0]["kept"] > 0
    assert results["rounds"][0]["label_accuracy_before"] is None  # nobody knows the truth here
