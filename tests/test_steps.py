"""The filters as steps of a run, without any model: what they part, count and write down."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint

from gramr2 import run_directory
from gramr2.files import read_rows
from gramr2.judge import RewardModel
from gramr2.parallel import Ranks
from gramr2.prompts import own_template
from gramr2.prover import Prover
from gramr2.records import Judgment, Pair, Vote
from gramr2.run_directory import RunDirectory
from gramr2.settings import SelfTrainSettings, TrainSettings
from gramr2.steps import NothingKept, Run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.setattr(run_directory, "shard_rows", lambda *_: 4)
    directory = RunDirectory(tmp_path / "run", {}, [], Ranks(0, 1, torch.device("cpu")))
    return Run(directory, SelfTrainSettings(), {}, {})


def judged(n: int, labels: str) -> dict:
    """A judgment by as many votes as letters; half of them in either order; - is an abstention."""
    pair = Pair((("user", f"question {n}?"),), f"right {n}", f"wrong {n}", id=f"{n}")
    votes = [
        Vote(None if label == "-" else label, ("AB", "BA")[i % 2], {"A": 0.9, "B": 0.1}.get(label))
        for i, label in enumerate(labels)
    ]
    return {"id": pair.id, **Judgment.from_votes(votes).to_json(), "pair": pair.to_json()}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_label_filters_part_what_was_judged_and_write_down_every_drop(run, tmp_path):
    """Kept with the label of the votes; dropped with the reason and the figures; balanced afterwards."""
    rows = [judged(0, "AAAA"), judged(1, "AAAAAAAB"), judged(2, "ABAB"), judged(3, "AAAA"), judged(4, "----")]
    rows.append({"id": "5", "error": "too long", "pair": judged(5, "AA")["pair"]})
    rows.append(judged(6, "AA--"))
    path = run.filter_labels("labels", write(tmp_path / "judged.jsonl", rows), 1)
    kept = {row["id"]: row for row in read_rows(path)}
    assert {i: row[f"response_{row['label'].lower()}"] for i, row in kept.items()} == {
        i: f"right {i}" for i in ("0", "1", "3")
    }
    labels = [row["label"] for row in kept.values()]
    assert abs(labels.count("A") - labels.count("B")) <= 1
    dropped = {row["id"]: row for row in read_rows(path.with_name("dropped.jsonl"))}
    reasons = {i: row["reason"].partition(":")[0] for i, row in dropped.items()}
    assert reasons == {"2": "agreement", "4": "agreement", "5": "not judged", "6": "confidence"}
    assert dropped["6"]["votes"] == {"A": 2, "B": 0, "none": 2} and dropped["6"]["label"] == "A"
    counts = run.directory.counts["labels"]
    assert (counts["in"], counts["kept"]) == (7, 3) and sum(counts["dropped"].values()) == 4
    # Pair 2 and pair 4 would have fallen to it as well; a filter that objects to none is counted with 0.
    assert counts["alone"]["confidence"] == 3 and counts["alone"]["softmax"] == 0


def test_what_was_filtered_does_not_depend_on_the_shards(run, tmp_path, monkeypatch):
    """Balancing goes on from shard to shard; a filter that began anew in each would balance each."""
    source = write(tmp_path / "judged.jsonl", [judged(n, "AAAA" if n % 3 else "BBBB") for n in range(11)])
    first = run.filter_labels("labels", source, 1).read_bytes()
    shutil.rmtree(run.directory.root)
    monkeypatch.setattr(run_directory, "shard_rows", lambda *_: 64)
    assert run.filter_labels("labels", source, 1).read_bytes() == first


def test_filters_that_keep_nothing_end_the_loop_and_name_the_filter(run, tmp_path):
    source = write(tmp_path / "judged.jsonl", [judged(0, "AB")])
    with pytest.raises(NothingKept, match=r"agreement .*orders disagree.*loosen that filter"):
        run.filter_labels("labels", source, 1)


def test_a_loop_whose_judge_writes_no_verdict_is_told_to_train_it(run, tmp_path):
    """To loosen a filter would not help: nothing could be read."""
    source = write(tmp_path / "judged.jsonl", [judged(0, "--"), judged(1, "----"), judged(2, "AB")])
    with pytest.raises(NothingKept, match=r"no readable vote.*train the judge longer"):
        run.filter_labels("labels", source, 1)


def test_the_backbone_is_asked_with_the_prompt_that_its_judges_are_trained_with(tmp_path, run):
    """It brings none; asked with a longer one than they, it would be another baseline."""
    make_checkpoint(tmp_path / "backbone", "llama3")
    run.trainings = {"reward": TrainSettings(prompt="short", device="cpu")}
    judge, prover = (run.load(kind, tmp_path / "backbone") for kind in (RewardModel, Prover))
    assert [judge.template, prover.template] == [own_template(each, "short") for each in ("judge", "prover")]
