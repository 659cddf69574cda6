"""What a command starts from in the toy: its world, and a backbone that knows no price.

Both are made where they are not there yet; the backbone that is shipped is one of `--stage pretrain`.
`toy_inputs` makes them as steps of a self-training run, which keeps a world of its own, and `make_toy` for
train.py, in the directory that the recipe names.

It leaves out: what a world is (toyworld.py), and what the stage policy needs beside it (policy_start.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gramr2 import fit
from gramr2.extras import toyworld
from gramr2.extras.inputs import KINDS, RunInputs, prepare
from gramr2.files import JsonRow, need
from gramr2.parallel import Ranks
from gramr2.recipes import resolve
from gramr2.run_directory import RunDirectory
from gramr2.settings import SelfTrainSettings, Sources, TrainSettings
from gramr2.stages import STAGES


def toy_inputs(
    directory: RunDirectory, world: JsonRow, settings: SelfTrainSettings, pretraining: TrainSettings
) -> RunInputs:
    """A self-training run's own world, and a step that pre-trains its backbone where none has its shape."""
    sizes = world | {"seed": settings.seed}
    with directory.step("world") as step:
        if step.to_do:
            directory.ranks.on_rank_0(lambda: toyworld.make_world(step.path, **sizes))
            step.close(sizes)
    place = step.path
    backbone = place / "backbone" / "model"
    if not directory.ranks.on_rank_0((backbone / "config.json").is_file):
        with directory.step("backbone") as step:
            if step.to_do:
                text = [place / "pretrain.jsonl"]
                step.close(fit.train("pretrain", pretraining, text, place / "backbone_init", step.path))
        backbone = step.path / "model"
    files: JsonRow = {name: (str(place / f"{name}.jsonl"),) for name in KINDS}
    return prepare(directory, settings, Sources(str(backbone), **files))


def make_toy(arguments: argparse.Namespace, sources: Sources, ranks: Ranks) -> Path | None:
    """Makes the toy's files; → the model to start from: `--model`, or None for the one that the recipe names.

    The untrained one takes its place for pretrain, and in a dry run that would train the backbone first.
    """
    place, sizes = toyworld.world_table(arguments.recipe)
    need(place != "", "the recipe's [world] names no directory, where the toy's files are to lie")
    directory = Path(place)
    untrained = directory / "backbone_init"

    def make() -> None:
        toyworld.make_world(directory, **sizes)
        if arguments.stage == "pretrain" and not (untrained / "config.json").exists():
            toyworld.write_untrained(directory, **sizes)  # the shipped backbone is made from this

    ranks.on_rank_0(make)
    if arguments.model or arguments.stage == "pretrain":
        return arguments.model or untrained
    if not ranks.on_rank_0((Path(sources.backbone) / "config.json").exists):
        if arguments.dry_run:
            return untrained  # of the same shape, which is all that a plan asks
        tables = ["train", *STAGES["pretrain"].tables]
        settings = resolve(TrainSettings, arguments.recipe, tables, {"threads": 1})
        data = [Path(path) for path in sources.pretrain]
        fit.train("pretrain", settings, data, untrained, Path(sources.backbone).parent)
    return None
