"""Launch choices: benchmarks/tune.py finds them, kernels/tuning.py gives them to whoever asks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import tables
import tune

from gramr2.kernels import tuning

CPU = torch.device("cpu")
MS = {1: 10.0, 2: 8.0, 3: 1.0, 4: 9.9, 5: 1.0}  # of a launch, by its block: 1 is built in


def launch() -> list[torch.Tensor]:
    """A kernel that is wrong with blocks of 3, too large with 5, and hardly faster with 4."""
    block = tuning.choice("made up", "float32 to 8", CPU, block=1, stages=2)["block"]
    if block == 5:
        raise RuntimeError("out of shared memory")
    return [torch.full((4,), float("nan") if block == 3 else 1.0)]


def tried(monkeypatch, *blocks: int, until: float = float("inf")) -> dict:
    def clock(run, device):
        run()
        return MS[tuning.choice("made up", "float32 to 8", CPU, block=1, stages=2)["block"]] / 1e3

    monkeypatch.setattr(tune, "clock", clock)
    entry = tune.Entry("made up", launch, (), (), (), (), 1e-3)
    problem = tune.Problem("four numbers", launch, lambda: [torch.ones(4)])
    candidates = [{"block": block, "unknown": 7} for block in blocks]
    (row,) = tune.tune(entry, [problem], candidates, "cpu", until)
    return row


def test_what_is_wrong_or_does_not_run_never_wins(monkeypatch):
    """The fastest way to be fast is to skip work: other results would train other models."""
    row = tried(monkeypatch, 3, 5, 2, 4)
    assert row["choice"] == {"block": 2, "stages": 2}
    assert (row["tried"], row["wrong"], row["failed"]) == (4, 1, 1)
    assert row["built_in_ms"] == pytest.approx([10]) and row["gain"] == pytest.approx(10 / 8)
    row = tried(monkeypatch, 3, 5, 4)
    assert row["choice"] is None, "one per cent is not worth a line in a file"
    assert tried(monkeypatch, 2, until=time.monotonic())["tried"] == 0
    monkeypatch.setattr(tune, "agrees", lambda *_: False)
    assert "choice" not in tried(monkeypatch, 2), "nor where the kernel is wrong as it stands"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A place for choices; what was read before is forgotten, before and after."""
    monkeypatch.setenv("GRAMR2_TUNING", str(tmp_path / "tuning.json"))

    def forget():
        tuning.choices.cache_clear()
        tuning.choice.cache_clear()

    forget()
    yield tmp_path / "tuning.json", forget
    forget()


def test_the_file_is_what_kernels_are_given(monkeypatch, file):
    """And it keeps what it says of others: a second card must not cost the first one its choices."""
    path, forget = file
    other = {"another card": {"made up, float32 to 8": {"block": 9}}}
    path.write_text(json.dumps(other | {"cpu": {"made up, float16": {"block": 4}}}))
    asked = dict(device=CPU, block=1, stages=2)
    assert tuning.choice("made up", "float32 to 8", **asked) == {"block": 1, "stages": 2}
    tune.publish(path, "cpu", [tried(monkeypatch, 2)])
    forget()
    assert tuning.choice("made up", "float32 to 8", **asked) == {"block": 2, "stages": 2}
    assert tuning.choice("made up", "float16", **asked)["block"] == 4
    assert tuning.choice("made up", "float32 to 16", **asked)["block"] == 1
    with tuning.trying({"made up, float32 to 8": {"block": 3}}):
        assert tuning.choice("made up", "float32 to 8", **asked)["block"] == 3
        assert tuning.choice("made up", "float16", **asked)["block"] == 1, "what is tried is tried alone"
    assert tuning.choice("made up", "float32 to 8", **asked)["block"] == 2
    late = tried(monkeypatch, 4, until=time.monotonic())
    tune.publish(path, "cpu", [late])  # it says nothing of what was chosen before
    assert json.loads(path.read_text())["cpu"]["made up, float32 to 8"]["block"] == 2
    tune.publish(path, "cpu", [tried(monkeypatch, 4)])  # the built-in numbers are best after all
    assert json.loads(path.read_text()) == other | {"cpu": {"made up, float16": {"block": 4}}}


@pytest.mark.parametrize(
    "text", ['{"cpu": ', "[]", '{"cpu": 3}', '{"cpu": {"made up, float32 to 8": {"block": "two"}}}']
)
def test_a_damaged_file_is_reported_and_not_used(text, monkeypatch, file, capsys):
    path, forget = file
    path.write_text(text)
    with pytest.warns(UserWarning, match="is not used"):
        assert tuning.choice("made up", "float32 to 8", CPU, block=1) == {"block": 1}
    tune.publish(path, "cpu", [tried(monkeypatch, 2)])
    forget()
    assert tuning.choice("made up", "float32 to 8", CPU, block=1) == {"block": 2}
    assert ("damaged" in capsys.readouterr().err) != text.endswith("}}}")  # other lines of it may be whole


def test_a_rehearsal_tries_every_kernel(tmp_path):
    """Problems and truths, on micro shapes in Triton's interpreter: broken, they cost a card's minutes."""
    pytest.importorskip("triton")
    words = "--device", "cpu", "--quick", "--out", tmp_path / "tuning.json"
    environment = os.environ | {"GRAMR2_RESULTS": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, tune.__file__, *words], env=environment, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    result = json.loads((tmp_path / "tuning_quick.json").read_text())
    assert {row["kernel"] for row in result["rows"]} == {entry.kernel for entry in tune.ENTRIES}
    for row in result["rows"]:
        assert "wrong" not in row["outcome"] and not row.get("failed"), row
        assert row["tried"] or row["kernel"] == "paged read"
    assert tables.TABLES["tuning-cuda"](lambda _: result).count("|") > 12
    assert json.loads((tmp_path / "tuning.json").read_text())
