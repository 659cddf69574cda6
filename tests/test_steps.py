"""The books of a run, its shards, and its filters' funnel, without any model."""

import json
import shutil

import pytest
import torch

from gramr2 import parallel, steps
from gramr2.files import InputError
from gramr2.records import Judgment, Pair, Vote
from gramr2.settings import SelfTrainSettings

HERE = parallel.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def run(tmp_path, monkeypatch) -> steps.Run:
    monkeypatch.setattr(steps, "PAIRS_PER_CALL", 4)
    return steps.Run(steps.Books(tmp_path / "run", {}, [], HERE), SelfTrainSettings(), {}, {})


def pair(n: int, **fields) -> Pair:
    return Pair((("user", f"question {n}?"),), f"right {n}", f"wrong {n}", **fields)


def test_finished_shards_are_kept_and_a_cut_one_is_done_again_whole(run, tmp_path):
    place, done = tmp_path / "step", []
    place.mkdir()

    def work(items):
        for item in items:
            done.append(item)
            if item == 6 and len(done) < 9:
                raise InputError("cut")
            yield {"item": item}

    with pytest.raises(InputError, match="cut"):
        run.in_shards(place, list(range(10)), work)
    assert [path.name for path in (place / "shards").glob("*.jsonl")] == ["000000000.jsonl"]
    steps.clear(place)
    steps.join(run.in_shards(place, list(range(10)), work), place / "whole.jsonl")
    assert [row["item"] for row in steps.read_rows(place / "whole.jsonl")] == list(range(10))
    assert done == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]


def test_a_shard_is_given_to_one_alone_and_a_killed_run_leaves_no_claim(tmp_path):
    shard = tmp_path / "shards" / "000000000.jsonl"
    assert steps.claim(shard) and not steps.claim(shard)
    steps.clear(tmp_path)
    assert steps.claim(shard)


def test_a_step_that_is_done_is_not_done_again_and_a_later_one_can_be_forgotten(run):
    calls = []
    for _ in range(2):
        books = steps.Books(run.books.root, {}, [], HERE)
        for name in ("one", "two"):
            assert books.step(name, lambda place, name=name: calls.append(name) or {"n": 1}) == {"n": 1}
    assert calls == ["one", "two"]
    books.forget("two")
    assert [path.name for path in (books.root / "steps").iterdir()] == ["01-one"]
    with pytest.raises(InputError, match=r"no step three.*one"):
        books.forget("three")


def test_settings_of_memory_may_change_between_starts_and_others_are_refused_by_name(tmp_path):
    """A cluster that has fewer or smaller GPUs today goes on with what was begun."""

    def start(**training):
        settings = {"k": 4, "train reward": {"lr": 1.0, "threads": 1} | training}
        steps.Books(tmp_path, settings, [], HERE).step("data", lambda place: {})

    start()
    start(threads=2)
    with pytest.raises(InputError, match=r"differs in train reward lr \(1.0, now 2.0\);"):
        start(lr=2.0)


def test_a_run_of_many_steps_is_done_again_from_any_of_them(run):
    """Numbers of three digits come last, not between 10 and 11; and what was concluded from them goes."""
    names = [f"s{number}" for number in range(1, 104)]
    for name in names:
        run.books.step(name, lambda place: {})
    (run.books.root / "results.json").write_text("{}")
    run.books.forget("s50")
    assert sorted(path.name for path in run.books.root.glob("steps/*")) == [
        f"{n:02}-s{n}" for n in range(1, 50)
    ]
    assert not (run.books.root / "results.json").exists()


def test_a_run_that_has_done_nothing_is_bound_to_nothing(tmp_path):
    """A name would be spent on settings that were refused."""
    steps.Books(tmp_path, {"pool": 100_000}, [], HERE)
    steps.Books(tmp_path, {"pool": 8}, [], HERE).step("data", lambda place: {})
    with pytest.raises(InputError, match="pool"):
        steps.Books(tmp_path, {"pool": 9}, [], HERE)


def test_a_directory_that_cannot_be_written_is_one_line(run):
    def work(place):
        raise PermissionError(13, "Permission denied", str(place / "x.jsonl"))

    with pytest.raises(InputError, match=r"x\.jsonl: Permission denied; mend that"):
        run.books.step("step", work)


def judged(n: int, labels: str) -> dict:
    """A judgment by as many votes as letters; half of them in either order; - is an abstention."""
    votes = [
        Vote(None if label == "-" else label, ("AB", "BA")[i % 2], {"A": 0.9, "B": 0.1}.get(label))
        for i, label in enumerate(labels)
    ]
    return {"id": f"{n}", **Judgment.from_votes(votes).to_json(), "pair": pair(n, id=f"{n}").to_json()}


def test_the_label_filters_part_what_was_judged_and_write_down_every_drop(run, tmp_path):
    """Kept with the label of the votes; dropped with the reason and the figures; balanced afterwards."""
    rows = [judged(0, "AAAA"), judged(1, "AAAAAAAB"), judged(2, "ABAB"), judged(3, "AAAA"), judged(4, "----")]
    rows.append({"id": "5", "error": "too long", "pair": pair(5, id="5").to_json()})
    rows.append(judged(6, "AA--"))
    source = tmp_path / "judged.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = run.filter_labels("labels", source, 1)
    kept = {row["id"]: row for row in steps.read_rows(path)}
    assert {i: row[f"response_{row['label'].lower()}"] for i, row in kept.items()} == {
        i: f"right {i}" for i in ("0", "1", "3")
    }
    labels = [row["label"] for row in kept.values()]
    assert abs(labels.count("A") - labels.count("B")) <= 1
    dropped = {row["id"]: row for row in steps.read_rows(path.with_name("dropped.jsonl"))}
    reasons = {i: row["reason"].partition(":")[0] for i, row in dropped.items()}
    assert reasons == {"2": "agreement", "4": "agreement", "5": "not judged", "6": "confidence"}
    assert dropped["6"]["votes"] == {"A": 2, "B": 0, "none": 2} and dropped["6"]["label"] == "A"
    counts = run.books.counts["labels"]
    assert (counts["in"], counts["kept"]) == (7, 3) and sum(counts["dropped"].values()) == 4
    assert counts["alone"]["confidence"] == 3  # pair 2 and pair 4 would have fallen to it as well


def test_what_was_filtered_does_not_depend_on_the_shards(run, tmp_path, monkeypatch):
    """Balancing goes on from shard to shard; a filter that began anew in each would balance each."""
    rows = [judged(n, "AAAA" if n % 3 else "BBBB") for n in range(11)]
    source = tmp_path / "judged.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = run.filter_labels("labels", source, 1).read_bytes()
    shutil.rmtree(run.books.root)
    monkeypatch.setattr(steps, "PAIRS_PER_CALL", 64)
    assert run.filter_labels("labels", source, 1).read_bytes() == first


def test_filters_that_keep_nothing_end_the_loop_and_name_the_filter(run, tmp_path):
    source = tmp_path / "judged.jsonl"
    source.write_text(json.dumps(judged(0, "AB")) + "\n")
    with pytest.raises(steps.NothingKept, match="agreement"):
        run.filter_labels("labels", source, 1)
