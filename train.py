"""Trains one model: the prover, the reward model, one of the models it is compared with, or a policy.

    python train.py --stage prover                            the toy, from nothing, on a laptop
    torchrun --nproc_per_node=8 train.py --stage reward --recipe recipes/llama3.1-8b.toml \\
        --model Llama-3.1-8B-Instruct --data human.jsonl       one model on eight GPUs
    python train.py --stage reward --model runs/x/model --data helpsteer3-stem.jsonl --limit 1000
                                                              task adaptation
    python train.py --stage reward --model MODEL --data human.jsonl --lora-rank 16
                                                              adapters of it alone, on a small card (LoRA)
    python train.py --merge runs/train-reward/model --out WHOLE
                                                              what they make of it, as a model of its own
    torchrun --nproc_per_node=2 train.py --stage policy       the toy's clerk, with a judge's rewards
    torchrun --nproc_per_node=8 train.py --stage policy --recipe recipes/llama3.1-8b.toml \\
        --model POLICY --judge runs/x/model --data prompts.jsonl --reward pairwise

The model ends in OUT/model, a Hugging Face directory that says in its README.md what it is and how to use it;
OUT/metrics.jsonl has a row per step, and `--log tensorboard` shows them as they come. The same
command continues a run that was cut, on any number of ranks. SIGTERM and Ctrl-C save first; the exit
status is then 130. The stages are a table in gramr2/stages.py, and the loop is gramr2/fit.py.

The stage policy (gramr2/extras/policy.py) rewards a model's own answers: by a judge that compares them with
its greedy answer (pairwise) or with each other (tournament), or by a discriminative model (scalar). Without
--judge it takes the newest run of selftrain.py under runs/; in the toy, that run's world too. Where there is
none, the toy trains a judge on its few annotated pairs first. The toy's policy is one that imitates both
clerks, OUT-start; the judge made for it is OUT-judge. OUT/rollouts.jsonl has every answer with its reward.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is imported, or a package be missing
    from gramr2.interrupts import end_in_one_line

    end_in_one_line()

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gramr2.directories import base_of
from gramr2.extras import logs
from gramr2.extras.policy_settings import PolicySettings
from gramr2.files import InputError, Parser, disk_errors_as_input_errors, read_text, run_command
from gramr2.recipes import RECIPES, read_recipe, recipe_file, resolve
from gramr2.settings import Sources, TrainSettings, add_flags, given
from gramr2.stages import STAGES

TOY = RECIPES / "toy.toml"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    lines = [f"    {name:16}{stage.equation}" for name, stage in STAGES.items()]
    lines.append(f"    {'policy':16}a model's own answers, as a judge rewards them")
    parser = Parser("train.py", description="\n".join([str(__doc__), "Stages:", *lines]))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", choices=(*STAGES, "policy"), help="what to train")
    whole = "train nothing: make of an adapter (--lora-rank) and its base the whole model --out"
    what.add_argument("--merge", type=Path, metavar="DIR", help=whole)
    suits = "settings, as in selftrain.py [toy; with --model, as suits the model and its data]"
    parser.add_argument("--recipe", type=recipe_file, metavar="FILE", help=suits)
    parser.add_argument(
        "--data", type=Path, nargs="+", action="extend", metavar="FILE", help="JSONL [the recipe's]"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="where it starts from [the recipe's]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it goes [runs/train-STAGE]")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="policy: a reward model [the newest run's]")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and train nothing")
    logs.add_flag(parser)
    add_flags(parser, PolicySettings)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    if arguments.merge:
        return merge(arguments.merge, arguments.out)
    stage, settings, sources = arguments.stage, *resolved(arguments)
    if arguments.judge and stage != "policy":
        raise InputError(f"--judge goes with the stage policy, not with {stage}")

    from gramr2 import fit, parallel  # torch takes its seconds only once the arguments are good
    from gramr2.extras import dry_run, policy_start, toy_start
    from gramr2.extras.card import write_card

    out, data, model = arguments.out or Path("runs") / f"train-{stage}", arguments.data, arguments.model
    with (
        parallel.join_ranks(settings) as ranks,
        disk_errors_as_input_errors(out),
        logs.following(out, arguments.log, stage, asdict(settings), ranks.is_first and not arguments.dry_run),
    ):
        if isinstance(settings, PolicySettings):
            model = policy_start.command(arguments, settings, sources, out, ranks)
        else:
            if read_recipe(arguments.recipe).get("world") and not (data and model):
                model = toy_start.make_toy(arguments, sources, ranks)
            model = model or Path(named(sources, STAGES[stage].start, "--model"))
            data = data or [Path(path) for path in named(sources, STAGES[stage].data, "--data")]
            if not arguments.dry_run:
                fit.train(stage, settings, data, model, out)
            elif ranks.is_first:
                print(*dry_run.dry_run(stage, settings, data, model, ranks), sep="\n")
        if ranks.is_first and not arguments.dry_run:
            write_card(out / "model", model)
            print(f"model: {out / 'model'}")
    return 0


def merge(adapter: Path, out: Path | None) -> int:
    """A whole model, in its base's type, with the adapter's prompts."""
    base = base_of(adapter)
    if base is None:
        raise InputError(f"--merge {adapter}: is no adapter; one has an adapter_config.json")
    if out is None:
        raise InputError("--merge: give --out DIR, where the whole model goes")

    from gramr2.extras.card import write_card
    from gramr2.weights import load, save

    model, tokenizer = load(adapter, dtype="auto")
    texts = [*adapter.glob("*_prompt.txt"), *adapter.glob("training.json")]
    with disk_errors_as_input_errors(out):
        save(model, tokenizer, out, {path.name: read_text(path) for path in texts})
    if (out / "training.json").exists():
        write_card(out, base)
    print(f"model: {out}")
    return 0


def resolved(arguments: argparse.Namespace) -> tuple[TrainSettings, Sources]:
    """The settings, and where model and data stand. Only the toy takes the toy's settings."""
    stage, chosen = arguments.stage, arguments.recipe
    if chosen is None and arguments.model is None:
        chosen = TOY
    arguments.recipe = chosen or TOY  # its files, where none are named
    sources = resolve(Sources, arguments.recipe, ["models", "data"], {})
    kind = PolicySettings if stage == "policy" else TrainSettings
    start, files = (
        ("backbone", "unlabelled") if stage == "policy" else (STAGES[stage].start, STAGES[stage].data)
    )
    tables = ("train.policy",) if stage == "policy" else STAGES[stage].tables
    model, data = arguments.model, arguments.data or getattr(sources, files)
    if chosen and "world" in read_recipe(chosen):
        model = None
    elif model is None:
        model = getattr(sources, start) or sources.backbone
    flags = given(PolicySettings, arguments)
    return resolve(kind, chosen, ["train", *tables], flags, model, data), sources


def named(sources: Sources, field: str, flag: str):
    value = getattr(sources, field) or (sources.backbone if field == "prover" else None)
    if not value:
        raise InputError(f"the recipe names no {field}; give {flag}")
    return value


if __name__ == "__main__":
    run_command(main)
