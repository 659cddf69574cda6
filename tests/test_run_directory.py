"""A run's directory: steps that are done once, shards that one rank takes, and settings that hold."""

from pathlib import Path

import pytest
import torch

from gramr2 import run_directory
from gramr2.files import InputError, need
from gramr2.parallel import Ranks
from gramr2.run_directory import RunDirectory, Step

ALONE = Ranks(0, 1, torch.device("cpu"))


def begin(root: Path, **settings) -> RunDirectory:
    return RunDirectory(root, settings, [], ALONE)


def do(directory: RunDirectory, *names: str) -> list[str]:
    """Comes to each of these steps; → those that were still to be done."""
    done = []
    for name in names:
        with directory.step(name) as step:
            if step.to_do:
                done.append(name)
                step.close({"n": 1})
    return done


def paths(directory: RunDirectory) -> list[str]:
    return sorted(path.name for path in directory.root.glob("steps/*"))


def test_what_has_no_number_is_no_step(tmp_path):
    directory = begin(tmp_path)
    (tmp_path / "steps/notes-mine").mkdir(parents=True)
    assert do(directory, "one") == ["one"]
    assert list(run_directory.step_paths(tmp_path)) == ["one"]


def test_finished_shards_are_kept_and_a_cut_one_is_done_again_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "shard_rows", lambda *_: 4)
    seen = []

    def rows(items, cut):
        for item in items:
            seen.append(item)
            if item == cut:
                raise InputError("cut")
            yield {"item": item}

    def work(step: Step, cut=None):
        for shard, items in step.shards(range(10)):
            run_directory.write_shard(shard, rows(items, cut))

    with pytest.raises(InputError, match="cut"), begin(tmp_path).step("one") as step:
        work(step, cut=6)
    left = (tmp_path / "steps/01-one/shards").glob("*.jsonl")
    assert [path.name for path in left] == ["000000000-000000004.jsonl"]
    with begin(tmp_path).step("one") as step:
        work(step)
        assert [row["item"] for row in step.rows()] == list(range(10))
        step.close({})
    assert seen == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]
    assert not (tmp_path / "steps/01-one/shards").exists()


def test_a_step_that_goes_on_with_larger_shards_loses_no_row(tmp_path, monkeypatch):
    """As on a GPU after a CPU: a shard that is known by its first row alone would pass for the larger one."""

    def work(step: Step, size: int, rows: int):
        monkeypatch.setattr(run_directory, "shard_rows", lambda *_: size)
        for shard, items in step.shards(range(10)):
            need(items[0] < rows, "cut")
            run_directory.write_shard(shard, ({"item": item} for item in items))

    with pytest.raises(InputError, match="cut"), begin(tmp_path).step("one") as step:
        work(step, 4, rows=4)
    with begin(tmp_path).step("one") as step:
        work(step, 8, rows=10)
        assert [row["item"] for row in step.rows()] == list(range(10))
        step.close({})


def test_a_shard_is_given_to_one_alone_and_a_killed_run_leaves_no_claim(tmp_path):
    shard = tmp_path / "steps/01-one/shards/000000000-000000010.jsonl"
    shard.parent.parent.mkdir(parents=True)
    assert run_directory.claim(shard) and not run_directory.claim(shard)
    run_directory.remove_leftovers(tmp_path)
    assert run_directory.claim(shard)


def test_a_step_that_is_done_is_not_done_again_and_a_later_one_can_be_forgotten(tmp_path):
    assert do(begin(tmp_path), "one", "two") == ["one", "two"]
    again = begin(tmp_path)
    assert do(again, "one", "two") == [] and again.counts == {"one": {"n": 1}, "two": {"n": 1}}
    again.forget("two")
    assert paths(again) == ["01-one"]
    with pytest.raises(InputError, match=r"no step three.*one"):
        again.forget("three")
    (tmp_path / "results.json").mkdir()  # as what may not be written
    with pytest.raises(InputError, match=r"results\.json: .*; mend that"):
        again.forget("one")


def test_a_step_put_in_the_middle_renumbers_no_other(tmp_path):
    """A version with one step more would otherwise do everything behind it again, under other numbers."""
    do(begin(tmp_path), "one", "two")
    assert do(begin(tmp_path), "one", "between", "two") == ["between"]
    assert paths(begin(tmp_path)) == ["01-one", "02-two", "03-between"]


def test_settings_of_memory_may_change_between_starts_and_others_are_refused_by_name(tmp_path):
    """A cluster that has fewer or smaller GPUs today goes on with what was begun."""

    def start(**training):
        do(RunDirectory(tmp_path, {"k": 4, "train reward": {"lr": 1.0} | training}, [], ALONE), "data")

    start(threads=1, fsdp_size=0)
    start(threads=2, fsdp_size=8)
    with pytest.raises(InputError, match=r"differs in train reward lr \(1.0, now 2.0\);"):
        start(lr=2.0)


def test_a_run_of_many_steps_is_done_again_from_any_of_them(tmp_path):
    """Numbers of three digits come last, not between 10 and 11; and what was concluded from them goes."""
    directory = begin(tmp_path)
    do(directory, *(f"s{number}" for number in range(1, 104)))
    (tmp_path / "results.json").write_text("{}")
    directory.forget("s50")
    assert paths(directory) == [f"{number:02}-s{number}" for number in range(1, 50)]
    assert not (tmp_path / "results.json").exists()


def test_a_run_that_has_done_nothing_is_bound_to_nothing(tmp_path):
    """A name would be spent on settings that were refused."""
    begin(tmp_path, pool=100_000)
    do(begin(tmp_path, pool=8), "data")
    with pytest.raises(InputError, match="pool"):
        begin(tmp_path, pool=9)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(InputError, match=r"x\.jsonl: Permission denied; mend that"),
        begin(tmp_path).step("step") as step,
    ):
        raise PermissionError(13, "Permission denied", str(step.path / "x.jsonl"))
