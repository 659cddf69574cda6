"""The table of stages: what it names is there."""

import dataclasses
import subprocess
import sys
from pathlib import Path

from gramr2.loss import OBJECTIVES, negative_log_likelihood, preference
from gramr2.settings import Sources, TrainSettings
from gramr2.stages import STAGES

ROOT = Path(__file__).parents[1]


def test_every_stage_names_sources_that_a_recipe_has():
    fields = {field.name for field in dataclasses.fields(Sources)}
    assert {name for stage in STAGES.values() for name in (stage.data, stage.start)} <= fields


def test_label_smoothing_is_of_the_generative_stage_alone():
    """The other stages' letter stands behind a rationale, which has said it already."""
    smooth = TrainSettings(label_smoothing=0.1)
    found = {name: OBJECTIVES[stage.objective](smooth) for name, stage in STAGES.items()}
    assert found.pop("generative") is not negative_log_likelihood
    assert found.pop("discriminative") is preference
    assert set(found.values()) == {negative_log_likelihood}
    assert OBJECTIVES[STAGES["generative"].objective](TrainSettings()) is negative_log_likelihood


def test_help_names_every_stage_with_its_equation():
    said = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True)
    for name, stage in STAGES.items():
        assert f"{name:16}{stage.equation}" in said.stdout
