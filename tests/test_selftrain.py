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
from selfruns import ROOT, same_results, small_world

from gramr2 import prompts
from gramr2.examples import ExampleBuilder
from gramr2.extras import datasets
from gramr2.extras.toyworld import SHIPPED, WorldSettings, good_names, make_pair
from gramr2.files import only_writer
from gramr2.records import Pair, show
from gramr2.settings import PAIRS_PER_CALL, TrainSettings
from gramr2.steps import SHOWN
from gramr2.tokenizer import Tokenizer

KILL = ["--no-baselines"]  # their steps are of the same kinds as the others


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


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in read_lines(path)]


def step(place: Path, name: str) -> Path:
    (found,) = place.glob(f"runs/small/steps/*-{name}")
    return found


# ---------------------------------------------------------------------------------- kill -9 and go on


def test_killed_before_and_after_every_publication_it_goes_on_to_the_same_results(
    forks, small, whole, tmp_path
):
    """Level 1. Each start dies around the first publication at which none has died, until one ends.

    The recipe is smaller than micro, so that a start costs little; its steps are the same. What a start
    publishes again, such as the files at the end, it dies around once.
    """
    killed, statuses = tmp_path / "killed", [-9]
    killed.touch()
    while statuses == [-9]:
        statuses = forks.run(tmp_path, ["--recipe", small, *KILL], kill=str(killed))["statuses"]
    assert statuses == [0]
    every = [name for name in read_lines(whole / "publications") if name.startswith("runs/")]
    around = {f"{when} {name}" for name in every for when in ("before", "after")}
    assert len(around) > 80 and around <= set(read_lines(killed))
    assert same_results(whole / "runs/small", tmp_path / "runs/small")
    assert not [*tmp_path.rglob("*.claim"), *tmp_path.rglob(".*.tmp-*")]


def test_all_proofs_of_a_few_pairs_are_written_down_for_the_report(whole):
    kept = ["candidates" in row for row in read(step(whole, "prove-labelled") / "proofs.jsonl")]
    assert kept[:SHOWN] == [True] * SHOWN and len(kept) > SHOWN and not any(kept[SHOWN:PAIRS_PER_CALL])


def test_killed_at_five_moments_it_goes_on_to_the_same_results(forks, small, whole, tmp_path):
    """Level 1; a kill may come in the middle of a training step, of a write, or of an import."""
    rng, whole_seconds = random.Random(1), json.loads((whole / "seconds").read_text())
    for _ in range(5):
        forks.run(tmp_path, ["--recipe", small, *KILL], kill_after=rng.uniform(0.3, 0.5) * whole_seconds)
    done = forks.run(tmp_path, ["--recipe", small, *KILL])
    assert done["statuses"] == [0], done["logs"]
    assert same_results(whole / "runs/small", tmp_path / "runs/small")


def test_a_full_disk_is_one_line_and_the_next_start_goes_on(forks, small, whole, tmp_path):
    for n in (0, 3, 8, 16):
        done = forks.run(tmp_path, ["--recipe", small, *KILL], full=n)
        (error,) = errors(done)
        assert done["statuses"] == [2] and "No space left" in error and "run" in error
    assert forks.run(tmp_path, ["--recipe", small, *KILL])["statuses"] == [0]
    assert same_results(whole / "runs/small", tmp_path / "runs/small")


# ---------------------------------------------------------------------------------- what changed meanwhile


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


JUDGE = prompts.JUDGE_PROMPT
DAMAGE = {
    "a byte of the test": ("steps/*-data/test.jsonl", flip),
    "a byte of the held-out pairs": ("steps/*-data/held_out.jsonl", flip),
    "cut proofs": ("steps/*-prove-labelled/proofs.jsonl", cut),
    "emptied judgments": ("steps/*-round-1-predict/judged.jsonl", lambda path: path.write_bytes(b"")),
    "no kept pairs": ("steps/*-filter-labelled/kept.jsonl", Path.unlink),
    "a byte of the weights": ("steps/*-initial/model/model.safetensors", flip),
    "another prompt": (
        "steps/*-initial/model/judge_prompt.txt",
        lambda path: path.write_text(prompts.JUDGE_PROMPT),
    ),
    "a cut record": ("steps/*-prover/done.json", cut),
    "a byte of a record": ("steps/*-prover/done.json", flip),
    "a cut plan": ("plan.json", cut),
    "no plan": ("plan.json", Path.unlink),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_longer_what_a_step_left_is_refused_by_name(name, forks, small, whole, tmp_path):
    """All of it was used, with exit status 0."""
    shutil.copytree(whole / "runs", tmp_path / "runs")
    pattern, damage = DAMAGE[name]
    (path,) = (tmp_path / "runs/small").glob(pattern)
    damage(path)
    done = forks.run(tmp_path, ["--recipe", small, *KILL])
    (error,) = errors(done)
    assert done["statuses"] == [2] and path.name in error


def test_a_copied_run_is_the_same_and_a_byte_without_its_time_is_seen_where_it_is_asked_for(
    forks, small, whole, tmp_path
):
    shutil.copytree(whole / "runs", tmp_path / "runs", copy_function=shutil.copyfile)  # with new times
    assert forks.run(tmp_path, ["--recipe", small, *KILL])["statuses"] == [0]
    assert same_results(whole / "runs/small", tmp_path / "runs/small")
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(whole / "runs", tmp_path / "runs")
    (path,) = tmp_path.glob("runs/small/steps/??-initial/model/model.safetensors")
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert forks.run(tmp_path, ["--recipe", small, *KILL])["statuses"] == [0]
    assert "model.safetensors" in errors(forks.run(tmp_path, ["--recipe", small, *KILL, "--verify"]))[0]


@pytest.mark.parametrize("name", ["model.safetensors", "judge_prompt.txt", "human.jsonl"])
def test_what_a_run_was_begun_with_may_not_change_under_its_path(name, forks, small, micro, tmp_path):
    """A backbone, a prompt or a file of pairs that another took the place of, while the run was stopped."""
    place = tmp_path / "inputs"
    place.mkdir()
    recipe = small_world(micro, place)
    backbone = Path(shutil.copytree(micro / "steps/09-initial/model", place / "backbone"))
    recipe.write_text(recipe.read_text().replace(str(micro / "steps/09-initial/model"), str(backbone)))
    assert forks.run(tmp_path, ["--recipe", recipe, "--until", "data"])["statuses"] == [0]
    flip(place / name if name == "human.jsonl" else backbone / name)
    assert name in errors(forks.run(tmp_path, ["--recipe", recipe, "--until", "data"]))[0]


def kill_after(forks, small, whole, place: Path, moment: str) -> None:
    """Runs until a publication, and dies behind it."""
    every = [f"{when} {name}" for name in read_lines(whole / "publications") for when in ("before", "after")]
    (place / "killed").write_text("\n".join(each for each in every if each != f"after {moment}") + "\n")
    words = ["--recipe", small, *KILL]
    assert forks.run(place, words, kill=str(place / "killed"))["statuses"] == [-9], moment


@pytest.mark.parametrize(
    "damage", [flip, cut, lambda path: path.write_bytes(b"")], ids=["flip", "cut", "empty"]
)
def test_a_damaged_shard_or_resume_point_is_made_again_and_the_results_are_the_same(
    damage, forks, small, whole, tmp_path
):
    for pattern, file in (
        ("*-round-1-prove/shards/*.jsonl", ""),
        ("*-fine-tune/resume/step-00000001", "rank-0.safetensors"),
    ):
        moments = [
            name for name in read_lines(whole / "publications") if Path(name).match(f"steps/{pattern}")
        ]
        kill_after(forks, small, whole, tmp_path, moments[0])
        damage(tmp_path / moments[0] / file if file else tmp_path / moments[0])
    done = forks.run(tmp_path, ["--recipe", small, *KILL])
    # The only point there was: the step says so, and is begun anew once it is gone.
    assert done["statuses"] == [2] and "no resume point is whole" in errors(done)[0]
    shutil.rmtree(step(tmp_path, "fine-tune"))
    done = forks.run(tmp_path, ["--recipe", small, *KILL])
    assert done["statuses"] == [0], done["logs"]
    assert same_results(whole / "runs/small", tmp_path / "runs/small")


def test_a_run_has_one_process_and_a_directory_of_other_files_is_no_run(forks, small, whole, tmp_path):
    shutil.copytree(whole / "runs", tmp_path / "runs")
    with only_writer(tmp_path / "runs/small", is_directory=True):
        assert "another process" in errors(forks.run(tmp_path, ["--recipe", small, *KILL]))[0]
    (tmp_path / "runs/mine").mkdir()
    (tmp_path / "runs/mine/thesis.claim").touch()
    assert "no run of ours" in errors(forks.run(tmp_path, ["--recipe", small, "--name", "mine"]))[0]
    assert (tmp_path / "runs/mine/thesis.claim").exists()


# ---------------------------------------------------------------------------------- ranks


def test_two_ranks_sample_and_filter_what_one_does_and_a_dead_one_ends_both(forks, small, tmp_path):
    """Level 1: a shard's rows do not know who wrote them. A rank that waits for ever would hold a node."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    words = ["--recipe", small, "--until"]
    assert forks.run(one, [*words, "wrong-labels"], shard=2)["statuses"] == [0]
    shutil.copytree(one, two)
    assert forks.run(one, [*words, "filter-labelled"], shard=2)["statuses"] == [0]
    died = forks.run(two, [*words, "filter-labelled"], shard=2, ranks=2, die=[1, 2])
    assert died["statuses"][1] == -9 and died["statuses"][0] not in (0, -9) and died["seconds"] < 60
    done = forks.run(two, [*words, "filter-labelled"], shard=2, ranks=2)
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


def test_a_pair_is_known_by_what_it_says_and_not_by_its_number(forks, small, micro, tmp_path):
    """Files that number their rows alike would lose most; one that numbers a test pair anew, the test."""
    place, words = micro / "steps/01-world", ["--recipe", small, "--until", "data"]
    rows = {name: read(place / f"{name}.jsonl")[:8] for name in ("human", "labelled", "unlabelled", "test")}
    rows["labelled"].append(rows["test"][3])
    for name, chosen in rows.items():
        numbered = (json.dumps(row | {"id": str(number)}) + "\n" for number, row in enumerate(chosen))
        (tmp_path / f"{name}.jsonl").write_text("".join(numbered))
        words += [f"--{name}", tmp_path / f"{name}.jsonl"]
    assert forks.run(tmp_path, words)["statuses"] == [0]
    counts = json.loads((step(tmp_path, "data") / "done.json").read_text())["counts"]
    assert counts == dict.fromkeys(rows, 8) | {"labelled, known already": 1}
    ids = [row["id"] for name in rows for row in read(step(tmp_path, "data") / f"{name}.jsonl")]
    assert len(set(ids)) == 32
    never = forks.run(tmp_path, ["--recipe", small, *words[4:], "--until", "nosuch", "--name", "never"])
    assert never["statuses"] == [2] and "no step nosuch" in errors(never)[0]


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
    names = good_names(WorldSettings().goods)[:6]
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
backbone = "judge"
prover = "prover"

[data]
human = ["human.jsonl"]
labelled = ["labelled.jsonl"]
unlabelled = ["unlabelled.jsonl"]
test = ["test.jsonl"]

[selftrain]
iters = 1
k = 4
votes = 4
test_votes = 2
proof_tokens = 120
judge_tokens = 120
confidence = 0.0
# What a model that was random a moment ago cannot meet. The rest holds.
without = ["agreement", "states_label", "states_other", "coherence"]
baselines = false
side_by_side = false

[train]
batch_size = 8
steps = 40
max_length = 300
token_budget = 4096
lr = 1e-2

[train.reward]
steps = 60

[train.finetune]
steps = 4
lr = 1e-3
"""


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def published(place: Path) -> None:
    """Small files in the published schemas: HelpSteer3, Skywork-80K, Stack-Exchange, RM-Bench.

    24, 16, 16 and 2 x 9 pairs, and beside them a tie, equal responses, a duplicate and a lone answer.
    """
    human, labelled, unlabelled = [], [], []
    for n in range(25):
        better = 1 + n % 2
        said = {f"feedback{side}": "It is short." if side == better else "It is long." for side in (1, 2)}
        said |= {"score": (-2, 2)[n % 2], "reasoning": f"Response {better} is short."}
        score = said["score"] if n < 24 else 0
        human.append(
            {"domain": "general", "language": "english", "context": [turn("user", f"add {n}?")],
             "response1": f"a {n}", "response2": f"b {n}", "overall_preference": score,
             "individual_preference": [said]}
        )  # fmt: skip
    for n in (*range(25, 41), 25, 41):
        asked, worse = turn("user", f"add {n}?"), "ab"[n < 41]
        labelled.append(
            {"chosen": [asked, turn("assistant", f"a {n}")],
             "rejected": [asked, turn("assistant", f"{worse} {n}")], "source": "s"}
        )  # fmt: skip
    for n in range(42, 59):
        answers = [{"text": f"<p>{letter} {n}</p>", "pm_score": "1"} for letter in "ab"[: 1 + (n < 58)]]
        unlabelled.append({"qid": n, "question": f"<p>add {n}?</p>", "answers": answers})
    bench = [{"id": n, "prompt": f"add {n}?", "chosen": [f"a {n}{m}" for m in "xyz"],
              "rejected": [f"b {n}{m}" for m in "xyz"], "domain": "chat"} for n in (60, 61)]  # fmt: skip
    rows = {"skywork": labelled, "stack": unlabelled}
    for name, chosen in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    with gzip.open(place / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in human)
    (place / "bench.json").write_text(json.dumps(bench))


def two_models(place: Path) -> list[Tokenizer]:
    """A judge of LLaMA's kind and a prover of Qwen3's; the tokenizers know other words of these texts."""
    pairs = [Pair.from_json(row) for row in read(place / "human.jsonl")]
    proofs = [show(prompts.proof_from_rationale(pair.rationale, pair.label)) for pair in pairs]
    written = [prompts.judge_target(show(pair.rationale), pair.label) for pair in pairs]
    models = {"judge": ("llama3", written, 360), "prover": ("qwen3", proofs, 420)}
    for name, (family, corpus, size) in models.items():
        model = make_checkpoint(place / name, family, corpus=corpus, vocab_size=size)
        (model / f"{name}_prompt.txt").write_text(
            ("Prove {label}. " if name == "prover" else "") + "{question}\nA: {response_a}\nB: {response_b}"
        )
    return [Tokenizer.load(place / name) for name in models]


def test_published_data_and_two_tokenizers_run_from_end_to_end(forks, tmp_path):
    """Qwen3's prover and LLaMA's judge share text and nothing else. Nobody types a word in between.

    It shows the plumbing: models as small as these learn the form of a proof and little of its content, so
    the rules on content are switched off, by name.
    """
    published(tmp_path)
    formats = {
        "helpsteer3": ("train.jsonl.gz", "human", 24),
        "skywork-80k": ("skywork.jsonl", "labelled", 16),
    }
    formats |= {"stack-exchange": ("stack.jsonl", "unlabelled", 16), "rm-bench": ("bench.json", "test", 18)}
    for name, (source, target, count) in formats.items():
        datasets.main([name, str(tmp_path / source), str(tmp_path / f"{target}.jsonl")])
        assert len(read(tmp_path / f"{target}.jsonl")) == count
    judge, prover = two_models(tmp_path)
    (tmp_path / "published.toml").write_text(PUBLISHED)
    done = forks.run(tmp_path, ["--recipe", "published.toml"])
    assert done["statuses"] == [0], done["logs"][0][-3000:]

    root = tmp_path / "runs/published"
    counts = json.loads((root / "steps/01-data/done.json").read_text())["counts"]
    assert counts == {"test": 18, "human": 24, "labelled": 16, "unlabelled": 16}
    results = json.loads((root / "results.json").read_text())
    names = ["backbone", "initial", "round 1", "fine-tuned", "voting@2"]
    assert [row["name"] for row in results["rows"]] == names and results["stopped"] == ""
    (first,) = results["rounds"]
    assert first["judged"] == 16 and first["kept"] > 0
    assert first["label_accuracy_before"] is None  # nobody knows the truth here

    kept = [
        path for name in ("filter-labelled", "round-1-rationales") for path in root.glob(f"steps/*-{name}")
    ]
    config = TrainSettings(max_length=300)
    curriculum = ExampleBuilder("reward", config, [path / "kept.jsonl" for path in kept], tmp_path / "judge")
    assert curriculum.size > 0
    for i in range(curriculum.size):
        pair, (example,) = curriculum.record(i), curriculum.plain(i).sequences
        told = prompts.judge_target(show(pair.rationale), pair.label)
        ids = [i for i in example.ids[example.start :] if i not in judge.stop_ids]
        assert judge.decode(ids) == told and ids != prover.encode(told)
