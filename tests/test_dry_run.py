"""What a run costs is said before it begins."""

import shutil
from dataclasses import replace

import torch
from trainings import CONFIG, make

from gramr2 import cost
from gramr2.extras.dry_run import dry_run
from gramr2.parallel import Ranks
from gramr2.settings import TrainSettings


def test_dry_run_says_the_plan_and_reads_no_weights(tmp_path):
    """A plan must be possible for a model that this machine could never hold."""
    whole, data = make(tmp_path)
    model = shutil.copytree(whole, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    settings, alone = TrainSettings(**CONFIG), Ranks(0, 1, torch.device("cpu"))
    lines = "\n".join(dry_run("reward", settings, [data], model, alone))
    for word in (
        "52,464 parameters",
        "48 examples",
        "6 of 8 examples",
        "GB on each of 1 ranks",
        "0.003 at",
        "24 GB   yes",
    ):
        assert word in lines
    assert "warning" not in lines
    # On the CPU nothing is computed again, unless it is asked for: it said the least that any setting takes.
    for recompute, same in ((0, True), (99, False)):
        asked = "\n".join(dry_run("reward", replace(settings, recompute=recompute), [data], model, alone))
        assert (asked == lines) is same


def test_settings_that_would_undo_a_model_are_questioned(tmp_path, monkeypatch):
    """The toy's 600 epochs at 1e-2 were taken by models that had been trained on text, without a word."""
    model, data = make(tmp_path)
    monkeypatch.setattr(cost, "PRETRAINED", 0)
    settings, alone = TrainSettings(**CONFIG | {"steps": 120, "lr": 1.0}), Ranks(0, 1, torch.device("cpu"))
    lines = "\n".join(dry_run("reward", settings, [data], model, alone))
    assert "120 steps make 20 epochs of these 48 examples" in lines and "make 18 steps" in lines
    assert "lr 1 would undo what a model of this size knows; about 0.04 suits it" in lines
