"""The thread: every arrow of the algorithm, from a world to a judged reward model, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = ["backbone", "discriminative", "generative", "initial", "round 1", "labelled only, 2x steps",
        "fine-tuned", "voting@16"]  # fmt: skip
ROUND = {"judged", "agreed", "confident", "wellformed", "kept", "dropped", "label_accuracy_before",
         "label_accuracy_after"}  # fmt: skip


def command(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / name), *words], capture_output=True, text=True, cwd=cwd, check=False
    )


def micro(cwd: Path, *words: str) -> subprocess.CompletedProcess:
    return command("selftrain.py", "--recipe", str(ROOT / "recipes/micro.toml"), *words, cwd=cwd)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished micro run in an empty directory."""
    place = tmp_path_factory.mktemp("thread")
    done = micro(place)
    assert done.returncode == 0, done.stderr
    said = ("voting@16", "report.html", "95% interval", "1 disputed", "of the kept", "steps:", "control")
    assert not [text for text in said if text not in done.stdout]
    assert "warning" not in done.stderr.lower()  # of a healthy run
    next_words = done.stdout.partition("next:")[2].split()[:4]
    assert next_words[:3] == ["python", "infer.py", "--pair"]
    judged = command(*next_words[1:], "--votes", "2", "--json", cwd=place)
    assert judged.returncode == 0 and "label" in json.loads(judged.stdout)
    return place


def test_a_run_leaves_what_the_interfaces_promise(run):
    root = run / "runs/micro"
    results = json.loads((root / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ROWS
    for row in results["rows"]:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 100 and row["n"] == 24
        assert set(row["by_domain"]) == {"1 disputed", "2 disputed"}
    assert len(results["rounds"]) == 1 and set(results["rounds"][0]) >= ROUND
    assert {label: each["asked"] for label, each in results["prover"].items()} == {"right": 48, "wrong": 48}
    plan = json.loads((root / "plan.json").read_text())
    assert {"settings", "inputs", "code"} <= set(plan)
    steps = sorted((root / "steps").iterdir())
    assert [step.name[:2] for step in steps] == [f"{n:02}" for n in range(1, len(steps) + 1)]
    for step in steps:
        done = json.loads((step / "done.json").read_text())
        assert {"counts", "seconds", "files"} <= set(done), step
    assert [path.parent.name for path in steps[1].rglob("config.json")] == ["model"]
    page = (root / "report.html").read_text()
    assert page.count("<script") == 1 and "round 1" in page


def test_the_funnel_counts_every_pair(run):
    """What was judged is either kept or dropped with a reason that stands in a file."""
    root = run / "runs/micro"
    (each,) = json.loads((root / "results.json").read_text())["rounds"]
    assert each["judged"] - sum(each["dropped"].values()) == each["kept"] > 0
    written = [
        json.loads(line)
        for path in root.glob("steps/*round-1*/dropped.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert all(row["id"] and row["reason"] for row in written)
    assert len(written) == sum(each["dropped"].values())
    stages = [each[name] for name in ("judged", "agreed", "confident", "wellformed", "kept")]
    assert stages == sorted(stages, reverse=True) and set(each["label_accuracy"]) == {
        *("judged", "agreed", "confident", "wellformed", "kept")
    }


def test_no_truth_reaches_training_or_filtering(run):
    """Unlabelled batches carry no label, and what is trained on carries the votes' label, right or wrong."""
    steps = {path.name[3:]: path for path in (run / "runs/micro/steps").iterdir()}
    batch = [json.loads(line) for line in (steps["data"] / "unlabelled-1.jsonl").read_text().splitlines()]
    assert batch and not any("label" in row or "rationale" in row for row in batch)
    judged = {
        row["id"]: row["label"]
        for row in map(json.loads, (steps["round-1-predict"] / "judged.jsonl").read_text().splitlines())
    }
    known = {row["id"]: row for row in batch}
    for row in map(json.loads, (steps["round-1-rationales"] / "kept.jsonl").read_text().splitlines()):
        turned = row["response_a"] != known[row["id"]]["response_a"]
        assert (row["label"] != judged[row["id"]]) == turned


def test_the_same_command_again_does_nothing_twice(run):
    before = {
        path: path.stat().st_mtime_ns for path in (run / "runs/micro/steps").rglob("*") if path.is_file()
    }
    again = micro(run)
    assert again.returncode == 0
    after = {
        path: path.stat().st_mtime_ns for path in (run / "runs/micro/steps").rglob("*") if path.is_file()
    }
    assert before == after


def test_from_and_until_redo_a_part_with_the_same_result(run):
    """Level 1 sameness: the last steps, done again in another process, give the same results.json."""
    path = run / "runs/micro/results.json"
    before = json.loads(path.read_text())
    path.unlink()
    stopped = micro(run, "--from", "fine-tune", "--until", "fine-tune")
    assert stopped.returncode == 0 and "stopped after" in stopped.stderr and not path.exists()
    assert micro(run).returncode == 0
    after = json.loads(path.read_text())
    assert {**after, "seconds": None} == {**before, "seconds": None}
    unknown = micro(run, "--from", "no-such-step")
    assert unknown.returncode == 2 and "no step no-such-step" in unknown.stderr


def test_other_settings_under_the_same_name_are_refused_by_name(run):
    refused = micro(run, "--k", "3")
    assert refused.returncode == 2 and "k (2, now 3)" in refused.stderr and refused.stdout == ""


def test_the_trained_model_judges_a_pair_and_a_file(run):
    """infer.py without --model takes the run's; readable in a terminal, or nothing but JSON."""
    test = run / "runs/micro/steps/01-world/test.jsonl"
    rows = test.read_text().splitlines()[:5]
    (run / "a.json").write_text(rows[0])
    (run / "in.jsonl").write_text("\n".join([*rows, '{"question": "no responses"}']) + "\n")
    said = command("infer.py", "--pair", "a.json", "--votes", "4", cwd=run)
    assert said.returncode == 0 and "votes:" in said.stdout and "runs/micro" in said.stderr
    judged = json.loads(command("infer.py", "--pair", "a.json", "--votes", "4", "--json", cwd=run).stdout)
    assert {"label", "p_a", "votes", "rationale"} <= set(judged) and sum(judged["votes"].values()) == 4

    bulk = ("infer.py", "--pairs", "in.jsonl", "--out", "out.jsonl", "--votes", "4", "--json")
    counts = json.loads(command(*bulk, cwd=run).stdout)
    assert counts == {"judged": 5, "before": 0, "failed": 1, "unread": 0, "forged": 0}
    out = [json.loads(line) for line in (run / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in out[:-1]] == [json.loads(row)["id"] for row in rows] and "error" in out[-1]
    # One pair alone and the same pair among others: the same judgment, bit for bit.
    apart = {"pair": None, "judge": None}  # a file's rows say of which weights they are as well
    assert judged | apart == out[0] | apart
    again = json.loads(command(*bulk, cwd=run).stdout)
    assert again == {"judged": 0, "before": 5, "failed": 1, "unread": 0, "forged": 0}
    assert len((run / "out.jsonl").read_text().splitlines()) == 6


def test_task_adaptation_starts_from_a_trained_model(run):
    human = "runs/micro/steps/01-world/human.jsonl"
    (model,) = (str(path.relative_to(run)) for path in run.glob("runs/micro/steps/*-fine-tune/model"))
    recipe = str(ROOT / "recipes/micro.toml")
    done = command("train.py", "--stage", "reward", "--recipe", recipe, "--model", model, "--data", human,
                   "--limit", "16", "--steps", "3", "--out", "adapted", cwd=run)  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "model: adapted/model"
    assert (run / "adapted/model/model.safetensors").is_file() and (run / "adapted/metrics.jsonl").is_file()
