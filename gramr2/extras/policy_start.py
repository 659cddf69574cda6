"""What `train.py --stage policy` starts from: a policy, prompts and a judge, found or made.

They are named on the command line; prompts may stand in the recipe, as its unlabelled pairs. A judge that is
not named is the newest self-training run's. In the toy shop world and backbone are those of the judge's run,
for a judge knows the prices of its own world only. Where no run has finished, the toy makes its world and
trains a judge on the few annotated pairs it has. The toy's policy imitates the lists of both clerks.

It leaves out: what is then done with them (policy.py).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gramr2 import fit, parallel
from gramr2.data import Store
from gramr2.extras.policy import Judged, train
from gramr2.extras.policy_settings import PolicySettings
from gramr2.extras.toy_start import make_toy
from gramr2.extras.toyworld import world_table
from gramr2.fields import Fields
from gramr2.files import InputError, read_json, write_rows
from gramr2.judge import RewardModel
from gramr2.recipes import resolve
from gramr2.records import Pair
from gramr2.run_directory import finished_runs, model_of
from gramr2.settings import Sources, TrainSettings
from gramr2.stages import STAGES

IMITATED = 600  # unlabelled pairs whose lists the toy's policy has read, both of each
IMITATION: dict[str, Any] = {"batch_size": 64, "steps": 100, "max_length": 64, "lr": 3e-3}


def command(
    arguments: argparse.Namespace,
    settings: PolicySettings,
    sources: Sources,
    out: Path,
    ranks: parallel.Ranks,
) -> Path | None:
    """`train.py --stage policy`: finds or makes what was not named, and trains into `out`; → where it
    began.

    In the toy, world and backbone are those of the judge's run, for it knows the prices of its own world
    only; where no judge of a run is named, the newest run's.
    """
    judge, model = arguments.judge, arguments.model
    data = arguments.data or [Path(path) for path in sources.unlabelled]
    directory, world = world_table(arguments.recipe)
    place = Path(directory)
    run = ranks.on_rank_0(lambda: run_of(world, judge))
    if world and not (arguments.data and model):
        backbone = Path(sources.backbone)
        if run:
            place = next(run.glob("steps/*-world"))
            backbone = next(run.glob("steps/*-backbone/model"), place / "backbone" / "model")
        elif not arguments.dry_run:
            make_toy(arguments, sources, ranks)
            judge = judge or make_judge(arguments.recipe, settings, place, backbone, out, ranks)
        data = arguments.data or [place / "unlabelled.jsonl"]
    judge = judge or (judge_of(run, settings) if run else None)
    if arguments.dry_run:
        if not ranks.is_first:
            return model
        found = {"judge": judge, "policy": model, "prompts": ", ".join(map(str, data)), "out": out}
        lines = [f"{name:8} {path or 'none yet; it would be made'}" for name, path in found.items()]
        print(*lines, *(f"{name:8} {value}" for name, value in asdict(settings).items()), sep="\n")
        return model
    if judge is None or not (model or world):
        what, flag = ("judge", "--judge") if judge is None else ("policy to start from", "--model")
        raise InputError(f"no {what}; give {flag} DIR (`python selftrain.py` makes a judge under runs/)")
    model = model or imitate(place, backbone, out.with_name(f"{out.name}-start"), ranks, settings)
    dtype = str(parallel.compute_dtype(settings, ranks.device)).removeprefix("torch.")
    reward = Judged(RewardModel.load(judge, ranks.device, dtype), settings)
    train(settings, data, model, out, reward, judge)
    return model


def run_of(world: dict[str, Any], judge: Path | None = None) -> Path | None:
    """The self-training run that `judge` is of, or under runs/ the one that finished last.

    For the toy, one whose world has these sizes.
    """
    own = [path for path in judge.resolve().parents if (path / "results.json").is_file()] if judge else []
    for run in (*own, *finished_runs()):
        made = next(run.glob("steps/*-world/world.json"), None)
        if not world or (made and world.items() <= Fields(read_json(made), f"{made}: ").row.items()):
            return run
    return None


def judge_of(run: Path, settings: PolicySettings) -> Path:
    """A run's own judge: its last one, or for scalar rewards its discriminative model."""
    if settings.reward != "scalar":
        return model_of(run)
    found = next(run.glob("steps/*-discriminative/model"), None)
    if found is None:
        raise InputError(f"{run}: ran without baselines, and has no scalar judge; give --judge DIR")
    return found


def make_judge(
    recipe: Path, settings: PolicySettings, world: Path, backbone: Path, out: Path, ranks: parallel.Ranks
) -> Path:
    """Where no run has finished: a judge from the toy's few annotated pairs, which knows few prices."""
    name = "discriminative" if settings.reward == "scalar" else "reward"
    pairs, tables = STAGES[name].data, ["train", *STAGES[name].tables]
    if ranks.is_first:
        fit.say([f"no finished run in runs/: a judge is trained on {pairs}.jsonl; selftrain.py makes better"])
    same = {each: getattr(settings, each) for each in ("seed", "device", "threads")}
    training = resolve(TrainSettings, recipe, tables, same)
    place = out.with_name(f"{out.name}-judge")
    fit.train(name, training, [world / f"{pairs}.jsonl"], backbone, place)
    return place / "model"


def imitate(world: Path, backbone: Path, out: Path, ranks: parallel.Ranks, settings: TrainSettings) -> Path:
    """A policy that answers as both of the toy's clerks do, right or wrong alike; -> its directory."""
    pairs, lists = Store(world / "unlabelled.jsonl", Pair.from_json), out / "lists.jsonl"
    some = [pairs[i] for i in range(min(IMITATED, len(pairs)))]
    both = [(pair.question, each) for pair in some for each in (pair.response_a, pair.response_b)]
    # The toy's tokenizer knows a word by the blank before it.
    rows = ({"question": question, "response": f" {each}"} for question, each in both)
    ranks.on_rank_0(lambda: write_rows(lists, rows))
    same = {name: getattr(settings, name) for name in ("seed", "device", "threads")}
    fit.train("pretrain", TrainSettings(**IMITATION, **same), [lists], backbone, out)
    return out / "model"
