"""benchmarks/acceptance.py: what it does on a GPU, rehearsed, and what it does with parts that go wrong."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import acceptance  # noqa: E402
import common  # noqa: E402
import endtoend  # noqa: E402
import memory  # noqa: E402
import profiles  # noqa: E402
import tables  # noqa: E402
import training  # noqa: E402

from gramr2 import weights  # noqa: E402
from gramr2.model import Decoder  # noqa: E402


def call(*words, results: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks/acceptance.py", *words]
    environment = os.environ | {"GRAMR2_RESULTS": str(results)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    """Broken, it would fill the README's GPU cells from a CPU, or end in a traceback."""
    said = call(results=tmp_path)
    assert said.returncode == 2 and said.stderr.startswith("error: there is no GPU here")
    assert len(said.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_rehearsal_runs_the_gpus_code_and_fills_its_tables(tmp_path):
    """The code of the GPU's benchmarks with micro models: arguments that do not exist, results that the
    tables cannot read, or a part that cannot start would otherwise be met on the day a GPU is at hand."""
    parts = "kernels", "sampler", "trainer"
    said = call("--device", "cpu", "--quick", "--part", *parts, "--deadline", "2000", results=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    (written,) = tmp_path.iterdir()
    whole = json.loads(written.read_text())
    assert [row["status"] for row in whole["parts"]] == ["passed"] * len(parts)
    results = {name.replace("_quick", "_cuda"): result for name, result in whole["results"].items()}
    for name in ("sequence-logprob", "sampling", "training"):
        table = tables.TABLES[f"{name}-cuda"](results.get)
        assert "Unmeasured" not in table and table.count("|") > 12


@pytest.mark.parametrize("script", [endtoend, memory, profiles], ids=lambda script: script.__name__)
def test_rehearsals_in_this_process(script, tmp_path, monkeypatch):
    """As above, for scripts that start no processes of their own."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", "--quick"])
    assert script.main() == 0
    (written,) = tmp_path.iterdir()
    assert written.stem == f"{script.__name__}_quick"
    table = tables.TABLES[f"{script.__name__}-cuda"](lambda _: json.loads(written.read_text()))
    assert table.count("|") > 12


def test_shares_fill_the_deadline_and_what_is_left_goes_on():
    """A part that took more than its share would take the last ones' time, and they the machine's."""
    assert acceptance.ends([30, 60], 540) == [30, 90]
    assert acceptance.ends([30, 60], 45) == [15, 45]
    assert acceptance.ends([30, 60], 1080) == [60, 180]
    assert sum(part.share for part in acceptance.PARTS) == acceptance.DEADLINE
    assert acceptance.share("sampler=200") == ("sampler", 200)


def test_the_newer_of_two_results_is_shown(tmp_path, monkeypatch):
    """A file brought from a GPU would stand unseen behind the one of the run before it, or hide the next."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    first, second = ({"environment": {"date": date}} for date in ("2026-11-27", "2026-11-27T22:10:00+00:00"))
    for alone, whole in ((first, second), (second, first)):
        (tmp_path / "sampling_cuda.json").write_text(json.dumps(alone))
        (tmp_path / "acceptance.json").write_text(json.dumps({"results": {"sampling_cuda": whole}}))
        assert tables.read("sampling_cuda") == second
    assert tables.read("never") is None


def test_a_result_names_its_commit(tmp_path, monkeypatch):
    """A figure outlives the code that it was measured on, and must say so."""
    assert common.environment().keys() >= {"commit", "gpu", "date", "versions"}
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.commit() is None, "outside a repository, or inside another one"

    def git(*words):
        names = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", tmp_path, *names, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "code").write_text("one")
    git("add", "code")
    git("commit", "-m", "one")
    assert re.fullmatch(r"[0-9a-f]{7,}", common.commit())
    (tmp_path / "code").write_text("two")
    assert re.fullmatch(r"[0-9a-f]{7,}\+", common.commit())


def test_the_training_benchmark_takes_steps_on_a_cpu(tmp_path, monkeypatch):
    """Its CPU figures are made by hand, so that a call that no longer fits would stand there unnoticed."""
    monkeypatch.setattr(training, "SMALL", training.MICRO["micro"])
    weights.save(Decoder(training.SMALL), None, tmp_path / "model")
    step = training.ours("ragged", tmp_path / "model")
    assert step()["loss"] > step()["loss"] > 0


def test_a_part_that_hangs_or_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    """One bad part must cost its own limit and nothing else, and must leave no process behind."""
    beats, script = tmp_path / "beats", ROOT / "tests/scripts/parts.py"
    parts = {
        name: acceptance.Part(name, "", limit, lambda *_, name=name: [script, name, beats])
        for name, limit in (("hangs", 2), ("fails", 9), ("works", 9))
    }
    monkeypatch.setattr(acceptance, "PARTS", list(parts.values()))
    monkeypatch.setattr(common, "RESULTS", tmp_path)

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["acceptance.py", "--device", "cpu", "--quick", *words])
        status = acceptance.main()
        written = json.loads((tmp_path / "acceptance_quick.json").read_text())
        return status, {row["part"]: row for row in written["parts"]}, written["results"]

    started = time.monotonic()
    status, rows, results = main()
    assert status == 1 and time.monotonic() - started < 9
    assert {name: row["status"] for name, row in rows.items()} == {
        "hangs": "out of time", "fails": "failed", "works": "passed",
    }  # fmt: skip
    assert "I began" in rows["hangs"]["said"] and "it broke" in rows["fails"]["said"]
    assert results == {"half": 1}, "what was measured before the limit is kept"
    beaten = beats.stat().st_size
    time.sleep(0.3)
    assert beaten == beats.stat().st_size > 0, "what a part had started goes with it"
    assert "it broke" in capsys.readouterr().out

    # Again, one part alone: the others' rows stay; and past the deadline nothing is started.
    status, again, _ = main("--part", "works")
    assert status == 0 and again["fails"] == rows["fails"]
    status, again, _ = main("--part", "works", "--deadline", "0")
    assert status == 1 and again["works"]["status"] == "not started"
