"""Trains one model: the prover, the reward model, one of the models it is compared with, or a policy.

    python train.py --stage prover                            the toy, from nothing, on a laptop
    torchrun --nproc_per_node=8 train.py --stage reward --recipe recipes/llama3.1-8b.toml \\
        --model Llama-3.1-8B-Instruct --data human.jsonl       one model on eight GPUs
    python train.py --stage reward --model runs/x/model --data helpsteer3-stem.jsonl --limit 1000
                                                              task adaptation
    torchrun --nproc_per_node=2 train.py --stage policy       the toy's clerk, with a judge's rewards
    torchrun --nproc_per_node=8 train.py --stage policy --recipe recipes/llama3.1-8b.toml \\
        --model POLICY --judge runs/x/model --data prompts.jsonl --reward pairwise

The model ends in OUT/model, a Hugging Face directory; OUT/metrics.jsonl has a row per step. The same
command continues a run that was cut, on any number of ranks. SIGTERM and Ctrl-C save first; the exit
status is then 130. What is trained is in gramr2/fit.py, the losses in gramr2/loss.py.

The stage policy (gramr2/extras/policy.py) rewards a model's own answers: by a judge that compares them with
its greedy answer (pairwise) or with each other (tournament), or by a discriminative model (scalar). Without
--judge it takes the newest run of selftrain.py under runs/; in the toy, that run's world too. Where there is
none, the toy trains a judge on its few annotated pairs first. The toy's policy is one that imitates both
clerks, OUT-start; the judge made for it is OUT-judge. OUT/rollouts.jsonl has every answer with its reward.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from gramr2.files import InputError, Parser, exit_status
from gramr2.settings import (
    STAGES,
    PolicySettings,
    Sources,
    TrainSettings,
    add_flags,
    given,
    read_recipe,
    resolve,
)

HERE = Path(__file__).resolve().parent
# What a stage trains on where the command line does not say: a field of Sources.
DATA = {"prover": "human", "reward": "human", "generative": "labelled", "discriminative": "labelled"}
DATA["pretrain"] = "pretrain"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("train.py", description=__doc__)
    parser.add_argument("--stage", required=True, choices=(*STAGES, "policy"), help="what to train")
    parser.add_argument("--recipe", type=Path, default=HERE / "recipes/toy.toml", help="settings [toy]")
    parser.add_argument(
        "--data", type=Path, nargs="+", action="extend", metavar="FILE", help="JSONL [the recipe's]"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="where it starts from [the recipe's]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it goes [runs/train-STAGE]")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="policy: a reward model [the newest run's]")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and train nothing")
    add_flags(parser, PolicySettings)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    stage, recipe = arguments.stage, arguments.recipe
    overrides = given(PolicySettings, arguments)
    kind = PolicySettings if stage == "policy" else TrainSettings
    settings = resolve(kind, recipe, ["train", f"train.{stage}"], overrides)
    if arguments.judge and stage != "policy":
        raise InputError(f"--judge goes with the stage policy, not with {stage}")
    sources = resolve(Sources, recipe, ["models", "data"], {})

    from gramr2 import fit, parallel  # torch takes its seconds only once the arguments are known to be good

    with parallel.join_ranks(settings) as ranks:
        world = read_recipe(recipe).get("world")
        if stage == "policy":
            from gramr2.extras import policy_start

            make = functools.partial(make_toy, world, sources, arguments, ranks)
            out = policy_start.command(arguments, settings, sources, make, ranks)
            if ranks.is_first and not arguments.dry_run:
                print(f"model: {out / 'model'}")
            return 0
        if world and not (arguments.data and arguments.model):
            make_toy(world, sources, arguments, ranks)
        model = arguments.model or named(sources, "prover" if stage == "prover" else "backbone", "--model")
        data = arguments.data or [Path(path) for path in named(sources, DATA[stage], "--data")]
        if arguments.dry_run:
            if ranks.is_first:
                print(*fit.dry_run(stage, settings, data, Path(model), ranks), sep="\n")
            return 0
        out = arguments.out or Path("runs") / f"train-{stage}"
        fit.train(stage, settings, data, Path(model), out)
        if ranks.is_first:
            print(f"model: {out / 'model'}")
    return 0


def named(sources: Sources, field: str, flag: str):
    value = getattr(sources, field) or (sources.backbone if field == "prover" else None)
    if not value:
        raise InputError(f"the recipe names no {field}; give {flag}")
    return value


def make_toy(world: dict, sources: Sources, arguments: argparse.Namespace, ranks) -> None:
    """The toy's world and its backbone, where they are not there yet.

    `--model` is filled in for pretrain, and for a dry run that would make the backbone.
    """
    from gramr2 import fit
    from gramr2.extras import toyworld

    sizes = dict(world)
    if "directory" not in sizes:
        raise InputError("the recipe's [world] names no directory, where the toy's files are to lie")
    directory = Path(sizes.pop("directory"))
    if ranks.is_first:
        toyworld.make_world(directory, **sizes)
        if arguments.stage == "pretrain" and not (directory / "backbone_init" / "config.json").exists():
            toyworld.write_untrained(directory, **sizes)  # the shipped backbone is made from this
    ranks.all_gather(None)  # the others wait for the files
    untrained = directory / "backbone_init"
    if arguments.stage == "pretrain":
        arguments.model = arguments.model or untrained
    elif not arguments.model and not (Path(sources.backbone) / "config.json").exists():
        if arguments.dry_run:
            arguments.model = untrained  # of the same shape, which is all that a plan asks
            return
        kind, tables = TrainSettings, ["train", "train.pretrain"]
        settings = resolve(kind, arguments.recipe, tables, {"threads": 1})
        data = [Path(path) for path in sources.pretrain]
        fit.train("pretrain", settings, data, untrained, Path(sources.backbone).parent)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
