"""`--log`: every row of a run once, whatever was cut and taken again, and none that could stop a training."""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from trainings import make, write_rows

from gramr2 import fit
from gramr2.commands import train
from gramr2.extras import logs
from gramr2.files import exit_status
from gramr2.records import Pair

STEPS = 12


class Writer:
    """torch's SummaryWriter, as far as it is used; `kept` is what its files hold."""

    kept: ClassVar = {}

    def __init__(self, place: str, purge_step: int):
        self.name, self.rows = place.rpartition("tensorboard/")[2], []
        Writer.kept[self.name] = self.rows  # the files before were removed

    def add_scalar(self, name, value, step):
        self.rows.append((name, step, value))

    def flush(self):
        pass


class Run:
    """A run of wandb; `sent` is what it was given, by all processes of one id."""

    sent: ClassVar = defaultdict(list)

    def __init__(self, id, **how):
        self.id, self.how = id or "made", how

    def define_metric(self, *names, **how):
        pass

    def log(self, values):
        Run.sent[self.id].append(values)

    def finish(self):
        pass


@pytest.fixture
def packages(monkeypatch):
    """Both, without their packages."""
    Writer.kept.clear()
    Run.sent.clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


def words(world, out, *names) -> list[str]:
    model, data = world
    words = f"--stage reward --model {model} --data {data} --out {out} --steps {STEPS} --batch-size 2 "
    words += "--save-steps 5 --max-length 700 --lr 3e-3 --device cpu --log"
    return [*words.split(), *names]


def cut_and_go_on(world, out, monkeypatch, *names) -> list[dict]:
    """A training that dies in its ninth step, is begun again, and takes three steps a second time."""
    step = fit.Loop.step

    def die(loop, examples):
        if loop.cursor.step == 8:
            raise RuntimeError("killed")
        return step(loop, examples)

    monkeypatch.setattr(fit.Loop, "step", die)
    with pytest.raises(RuntimeError, match="killed"):
        train.main(words(world, out, *names))
    monkeypatch.setattr(fit.Loop, "step", step)
    assert train.main(words(world, out, *names)) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def test_a_training_that_goes_on_logs_no_row_twice_and_leaves_none_out(
    world, tmp_path, monkeypatch, packages
):
    monkeypatch.setattr(logs, "SECONDS", 0.01)  # rows are seen before they are cut away
    rows = cut_and_go_on(world, tmp_path / "out", monkeypatch, "tensorboard", "wandb")
    expected = [(row["step"], row["loss"]) for row in rows]
    assert [row[1:] for row in Writer.kept["reward"] if row[0] == "loss"] == expected
    ((sent),) = Run.sent.values()  # one run of two processes
    assert [(each["reward/step"], each["reward/loss"]) for each in sent] == expected
    assert {"reward/lr", "reward/norm", "reward/tokens", "reward/seconds"} <= sent[0].keys()


def test_a_file_that_is_cut_between_two_looks_is_read_from_its_beginning(tmp_path):
    """Its new rows may be longer than those it had: what stands at the old place is no beginning of a row."""
    log, path = logs.Log(tmp_path, "reward", {}), tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}, "loss": 1}}\n' for n in range(1, 6)) + '{"step": 6, "lo')
    assert [row[1] for row in log.new_rows()] == [1, 2, 3, 4, 5]
    fit.keep_metrics(path, 2)
    with path.open("a") as file:
        file.writelines(f'{{"step": {n}, "loss": 1.00000001}}\n' for n in range(3, 8))
    assert [row[1] for row in log.new_rows()] == [6, 7]


def leave(step: Path, hits: int | None = None) -> None:
    """What a training leaves in its step; or a test that got so many of four pairs right."""
    step.mkdir(parents=True)
    if hits is None:
        (step / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 0.5}\n')
        return
    pairs = [Pair((("user", "?"),), "one", str(n), label="A") for n in range(4)]
    rows = ({"id": p.id, "label": "AB"[n >= hits], "pair": p.to_json()} for n, p in enumerate(pairs))
    write_rows(step / "rows", rows).rename(step / "judged.jsonl")


def test_a_self_training_run_is_logged_by_steps_and_its_accuracies_by_rounds(tmp_path, packages):
    leave(tmp_path / "steps/01-test-backbone", 1)
    leave(tmp_path / "steps/02-prover")
    leave(tmp_path / "steps/ahead-generative")  # by the second process; it gets its number later
    with logs.following(tmp_path, ["tensorboard", "wandb"], "", {"seed": 0}, True):
        for number, name in enumerate(["initial", "round-1", "round-2"]):
            leave(tmp_path / f"steps/0{3 + number}-test-{name}", number + 2)
    (tmp_path / "steps/ahead-generative").rename(tmp_path / "steps/06-generative")
    with logs.following(tmp_path, ["wandb"], "", {"seed": 0}, True):
        pass  # nothing is new
    found = Writer.kept
    assert found["prover"] == found["generative"] == [("loss", 2, 0.5)]
    assert [row for row in found["rounds"] if row[0] == "accuracy"] == [
        ("accuracy", 0, 50.0), ("accuracy", 1, 75.0), ("accuracy", 2, 100.0)
    ]  # fmt: skip
    assert {"accuracy", "low", "high", "n"} == {key for key, _, _ in found["test-backbone"]}
    (sent,) = Run.sent.values()
    assert [row["rounds/accuracy"] for row in sent if "rounds/step" in row] == [50.0, 75.0, 100.0]
    assert [row["generative/step"] for row in sent if "generative/step" in row] == [1, 2]
    shutil.rmtree(tmp_path / "steps/02-prover")  # as --from does; it is done again, and logged again
    with logs.following(tmp_path, ["wandb"], "", {}, True):
        leave(tmp_path / "steps/02-prover")
    assert [row["prover/step"] for row in sent if "prover/step" in row] == [1, 2, 1, 2]
    with logs.following(tmp_path, ["tensorboard"], "", {}, False):  # another rank
        Writer.kept.clear()
    assert not Writer.kept


def test_a_missing_package_is_a_line_before_anything_is_trained(world, tmp_path, monkeypatch, capsys):
    for name, module in {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}.items():
        monkeypatch.setitem(sys.modules, module, None)
        assert exit_status(train.main, words(world, tmp_path / "out", name)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and f'pip install "gramr2[{name}]"' in line
        assert not (tmp_path / "out").exists()


def test_a_log_that_cannot_begin_is_a_line_as_well(world, tmp_path, monkeypatch, packages, capsys):
    def refuse(**how):
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    assert exit_status(train.main, words(world, tmp_path / "out", "wandb")) == 2
    assert capsys.readouterr().err == "error: --log wandb: api_key not configured\n"
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_log_that_fails_costs_a_line_and_no_step(world, tmp_path, monkeypatch, packages, capsys):
    def refuse(run, values):
        raise OSError("no space left\nthere")

    monkeypatch.setattr(Run, "log", refuse)
    assert train.main(words(world, tmp_path / "out", "wandb")) == 0
    assert (tmp_path / "out/model/config.json").is_file()
    assert "warning: --log: WandB ends here: OSError" in capsys.readouterr().err


def test_what_tensorboard_reads_back_is_what_was_written_down(world, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(logs, "SECONDS", 0.01)
    rows = cut_and_go_on(world, tmp_path / "out", monkeypatch, "tensorboard")
    events = EventAccumulator(str(tmp_path / "out/tensorboard/reward"), size_guidance={"scalars": 0})
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert {"lr", "norm", "tokens", "seconds"} <= set(events.Tags()["scalars"])
