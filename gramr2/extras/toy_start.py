"""What a command starts from in the toy world: its files, and a backbone made where none is shipped."""

from __future__ import annotations

from gramr2 import fit
from gramr2.extras import toyworld
from gramr2.files import JsonRow
from gramr2.inputs import KINDS, RunInputs, prepare
from gramr2.run_directory import RunDirectory
from gramr2.settings import SelfTrainSettings, Sources, TrainSettings


def toy_inputs(
    directory: RunDirectory, world: JsonRow, settings: SelfTrainSettings, pretraining: TrainSettings
) -> RunInputs:
    """A self-training run's own world, and a step that pre-trains its backbone where none has its shape."""
    sizes = {name: value for name, value in world.items() if name != "directory"} | {"seed": settings.seed}
    with directory.step("world") as step:
        if step.to_do:
            directory.ranks.on_rank_0(lambda: toyworld.make_world(step.path, **sizes))
            step.close(sizes)
    place = step.path
    backbone = place / "backbone" / "model"
    if not (backbone / "config.json").is_file():
        with directory.step("backbone") as step:
            if step.to_do:
                text = [place / "pretrain.jsonl"]
                step.close(fit.train("pretrain", pretraining, text, place / "backbone_init", step.path))
        backbone = step.path / "model"
    files = {name: (str(place / f"{name}.jsonl"),) for name in KINDS}
    return prepare(directory, settings, Sources(str(backbone), **files))
