"""What a run costs is said before it begins."""

import shutil
from dataclasses import replace

import torch
from trainings import CONFIG, make

from gramr2.extras.dry_run import dry_run
from gramr2.parallel import Ranks
from gramr2.settings import TrainSettings


def test_dry_run_says_the_plan_and_reads_no_weights(tmp_path):
    """A plan must be possible for a model that this machine could never hold."""
    whole, data = make(tmp_path)
    model = shutil.copytree(whole, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    settings, alone = TrainSettings(**CONFIG), Ranks(0, 1, torch.device("cpu"))
    lines = "\n".join(dry_run("reward", settings, [data], model, alone))
    for word in ("52,464 parameters", "48 examples", "6 of 8 examples", "GB on each of 1 ranks"):
        assert word in lines
    # On the CPU nothing is computed again, unless it is asked for: it said the least that any setting takes.
    for recompute, same in ((0, True), (99, False)):
        asked = "\n".join(dry_run("reward", replace(settings, recompute=recompute), [data], model, alone))
        assert (asked == lines) is same
