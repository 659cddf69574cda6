"""Tokenized once: what training reads is what the builder makes, on any number of ranks."""

import pytest
import torch
from trainings import builder_of, make

from gramr2 import parallel
from gramr2.plan import make_plan
from gramr2.tokenized import global_batches

ALONE = parallel.Ranks(0, 1, torch.device("cpu"))
STAGES = {
    "prover": {"drop_condition": 0.3, "hide_label": 0.3},
    "generative": {"label_smoothing": 0.1},
    "discriminative": {"max_length": 1400},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_batches_of_a_run_are_what_the_builder_makes(world, tmp_path, stage):
    """Letters that are smoothed, pairs of sequences, and, epoch by epoch, what the prover is not shown."""
    builder = builder_of(stage, world, epochs=3.0, **STAGES[stage])
    plan = make_plan(builder, builder.settings, ALONE)
    wanted = [[builder(*use) for use in plan.step(step)] for step in range(plan.steps)]
    assert list(global_batches(plan, builder, ALONE, tmp_path, 0)) == wanted


def test_a_run_that_goes_on_tokenizes_nothing_and_damage_is_made_anew(world, tmp_path, monkeypatch):
    builder = builder_of("reward", world)
    plan = make_plan(builder, builder.settings, ALONE)
    wanted = list(global_batches(plan, builder, ALONE, tmp_path, 0))
    made = []
    monkeypatch.setattr(builder, "record", lambda i, record=builder.record: made.append(i) or record(i))
    assert list(global_batches(plan, builder, ALONE, tmp_path, 2)) == wanted[2:] and not made
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert list(global_batches(plan, builder, ALONE, tmp_path, 0)) == wanted and made
