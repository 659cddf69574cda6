"""The whole algorithm of GRAM-R² (arXiv 2509.02492, figure 2): a reward model that teaches itself to reason.

    python selftrain.py --iters 3                  the toy world, from nothing, on a laptop
    python selftrain.py --recipe micro    the same in half a minute, for a look at every file
    python selftrain.py --recipe R.toml --human H.jsonl --labelled L.jsonl --unlabelled U.jsonl --test T.jsonl

The run is the directory runs/NAME: plan.json, steps/, results.json, report.html. The same command goes on
after an interruption, and does nothing twice. Exit status: 0 done, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is imported, or a package be missing
    from gramr2.interrupts import end_in_one_line

    end_in_one_line()

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramr2.denoise import FILTERS
from gramr2.directories import model_files
from gramr2.extras import beside, logs
from gramr2.extras.card import write_cards
from gramr2.extras.inputs import KINDS, RunInputs, prepare
from gramr2.extras.report import write_report
from gramr2.extras.results import Results, lines_of
from gramr2.extras.toyworld import SHIPPED, world_rules, world_table
from gramr2.files import (
    InputError,
    JsonRow,
    Parser,
    as_started,
    disk_errors_as_input_errors,
    need,
    open_file,
    run_command,
    visible,
)
from gramr2.recipes import RECIPES, read_recipe, recipe_file, resolve
from gramr2.run_directory import RunDirectory, StoppedAsAsked
from gramr2.selection import SCORES
from gramr2.settings import SelfTrainSettings, Sources, TrainSettings, add_flags, check_names, given
from gramr2.stages import STAGES

if TYPE_CHECKING:  # torch takes its seconds only for a run
    from gramr2.steps import Run

# What a step does, and where it stands in figure 2, as `self_train` counts; the others only measure.
STEPS = {
    "prover": "the prover learns to justify a given label (figure 2, 1)",
    "wrong-labels": "the prover is asked for wrong labels too",
    "prove-labelled": "the prover writes rationales for the labelled pairs (figure 2, 2)",
    "filter-labelled": "unreliable rationales are filtered out (figure 2, 2)",
    "initial": "the first reward model is trained (figure 2, 3)",
    "predict": "the reward model labels unlabelled pairs (figure 2, 4)",
    "signals": "what knows that a label is wrong is weighed",
    "labels": "labels that it is not sure of are filtered out (figure 2, 4)",
    "prove": "the prover writes the rationales (figure 2, 5)",
    "rationales": "unreliable rationales are filtered out (figure 2, 5)",
    "train": "the reward model is trained again, on all of them (figure 2, 6)",
    "fine-tune": "the last fine-tuning, on human rationales (figure 2, 7)",
    "test": "a model is tested on held-out pairs",
    "discriminative": "a baseline is trained, with a scalar head",
    "generative": "a baseline is trained, on labels alone",
    "labelled-2x": "the control is trained, on labelled pairs alone",
}
REGISTRIES = {"select_by": SCORES, "without": FILTERS}  # whose names these settings may hold


def self_train(run: Run, inputs: RunInputs, results: Results | beside.Beside) -> None:
    """Figure 2, from top to bottom."""
    settings = run.settings
    human = [inputs.human] if settings.mix_human else []
    results.test("backbone", inputs.backbone)
    results.test_length()

    # 1. A preference-proving model learns to justify a given label (equation 4).
    prover = run.train("prover", "prover", [inputs.human], inputs.prover_base)
    results.ask_wrong_labels("wrong-labels", prover)

    # 2. It writes k proofs for each labelled pair; the best by equation 5 becomes the rationale
    #    (selection.py).
    proofs = run.prove("prove-labelled", prover, inputs.labelled)
    synthesized = [*human, run.filter_rationales("filter-labelled", proofs)]

    # 3. The first reward model is trained on rationale and label (equation 2).
    judge = run.train("initial", "reward", synthesized, inputs.backbone)
    results.test("initial", judge)

    for number, batch in enumerate(inputs.unlabelled, 1):
        # 4. The reward model labels unlabelled pairs by votes; labels it is not sure of are filtered out
        #    (denoise.py).
        judged = run.judge(f"round-{number}-predict", judge, batch, settings.votes)
        results.weigh_signals(f"round-{number}-signals", prover, judge, judged)
        labelled = run.filter_labels(f"round-{number}-labels", judged, number)
        # 5. The prover writes the rationales, and unreliable ones are filtered out.
        proofs = run.prove(f"round-{number}-prove", prover, labelled)
        synthesized.append(run.filter_rationales(f"round-{number}-rationales", proofs))
        # 6. All synthesized data together train the reward model again, from the backbone.
        judge = run.train(f"round-{number}-train", "reward", synthesized, inputs.backbone)
        results.test(f"round {number}", judge)

    # 7. Last comes a fine-tuning on the human rationales.
    final = run.train("fine-tune", "finetune", [inputs.human], judge)
    results.test("fine-tuned", final)
    results.test(f"voting@{settings.test_votes}", final, settings.test_votes)


def baselines(run: Run, inputs: RunInputs, results: Results | beside.Beside) -> None:
    """The models that the paper compares with, on the same pairs, and the same data trained for longer."""
    for stage in ("discriminative", "generative"):
        results.compare(stage, stage, stage, [inputs.labelled])
    kept = run.directory.paths["filter-labelled"] / "kept.jsonl"
    human = [inputs.human] if run.settings.mix_human else []
    results.compare("labelled only, 2x steps", "labelled-2x", "reward", [*human, kept], times=2)


# ---------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("selftrain.py", description=__doc__)
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    which = f"settings: a file, or one of {RECIPES} by name: {names} [toy]"
    parser.add_argument(
        "--recipe", type=recipe_file, default=RECIPES / "toy.toml", metavar="FILE", help=which
    )
    for name in KINDS:
        options: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "FILE"}
        parser.add_argument(f"--{name}", **options, help="pair files [the recipe's, or the toy's]")
    parser.add_argument("--name", help="the run is the directory runs/NAME [the recipe's name]")
    parser.add_argument("--from", dest="start", metavar="STEP", help="do this step, and all after it, again")
    parser.add_argument("--until", metavar="STEP", help="stop once this step is done")
    parser.add_argument("--verify", action="store_true", help="read finished steps' files again, all of them")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, and do nothing")
    logs.add_flag(parser)
    add_flags(parser, SelfTrainSettings, REGISTRIES)
    return parser.parse_args(argv)


def resolved(
    recipe: Path, overrides: dict[str, Any], sources: Sources | None = None
) -> tuple[SelfTrainSettings, dict[str, TrainSettings]]:
    """The settings of the loop, and those of each stage, which share its seed; what they leave open, as suits
    the models and data of `sources`, but for the toy's backbone."""
    settings = resolve(SelfTrainSettings, recipe, ["selftrain"], overrides)
    check_names(settings, REGISTRIES)
    trainings: dict[str, TrainSettings] = {}
    seed = {"seed": settings.seed}
    adapters = {"lora_rank": settings.lora_rank} if settings.lora_rank else {}
    for name, stage in STAGES.items():
        model, data = None, getattr(sources, stage.data, ())
        if sources and "world" not in read_recipe(recipe):
            model = getattr(sources, stage.start) or sources.backbone
        tables = ["train", *stage.tables]
        shared = seed if name == "pretrain" else seed | adapters  # which makes the toy's backbone, all of it
        trainings[name] = resolve(TrainSettings, recipe, tables, shared, model, data, settings.limit)
    return settings, trainings


def named_sources(arguments: argparse.Namespace) -> Sources | None:
    """The files and models that the command line and the recipe name; None: the recipe's own toy world."""
    named = {name: getattr(arguments, name) for name in KINDS if getattr(arguments, name)}
    is_toy = "world" in read_recipe(arguments.recipe)
    if is_toy and not named:
        return None
    tables = [] if is_toy else ["models", "data"]
    if is_toy:  # pairs of your own beside the toy's recipe keep to the shipped backbone's words
        named["backbone"] = str(SHIPPED)
    sources = resolve(Sources, arguments.recipe, tables, named)
    missing = ", ".join(f"--{name}" for name in KINDS if not getattr(sources, name))
    if missing or not sources.backbone:
        raise InputError(f"{arguments.recipe}: give {missing or 'a [models] backbone in the recipe'} as well")
    return sources


def main(argv: Sequence[str], runs: Path = Path("runs")) -> int:
    """The command. `runs` is where runs stand: those of a study have a directory of their own."""
    arguments = parse(argv)
    sources, recipe = named_sources(arguments), read_recipe(arguments.recipe)
    settings, trainings = resolved(arguments.recipe, given(SelfTrainSettings, arguments), sources)
    plan: JsonRow = {"recipe": arguments.recipe.stem, **asdict(settings)}
    plan |= {"from": asdict(sources)} if sources else {"world": recipe["world"]}
    plan |= world_plan(arguments.recipe)
    plan |= {f"train {stage}": asdict(each) for stage, each in trainings.items()}
    name = arguments.recipe.stem if arguments.name is None else arguments.name
    plain = re.fullmatch(r"[^/\\\x00-\x1f\ud800-\udfff.][^/\\\x00-\x1f\ud800-\udfff]{,99}", name)
    need(plain is not None, f"--name {name!r:.60}: expected a name, without slashes or a dot in front")
    root = runs / name
    if arguments.dry_run:
        print(json.dumps({"run": str(root), **plan}, indent=2))
        return 0
    files = [Path(file) for kind in KINDS for file in getattr(sources, kind, ())]
    if sources:
        for model in {sources.backbone, sources.prover} - {""}:
            files += model_files(Path(model))
    for file in files:
        open_file(file).close()

    from gramr2 import parallel
    from gramr2.steps import Run

    with parallel.join_ranks(trainings["reward"]) as ranks, ranks.only_writer(root):
        ranks.on_rank_0(lambda: beside.check_it_has_ended(root))
        directory = RunDirectory(root, plan, files, ranks, arguments.until, arguments.verify)
        if arguments.start:
            ranks.on_rank_0(lambda: directory.forget(arguments.start))
        run = Run(directory, settings, trainings, world_rules(plan))
        try:
            with logs.following(root, arguments.log, "", plan, ranks.is_first):
                run_to_the_end(run, inputs_of(run, arguments.recipe, sources), argv)
        except StoppedAsAsked as reached:
            directory.say(str(reached))
    return 0


def world_plan(recipe: Path) -> JsonRow:
    """What a plan says of the rules that its world brings."""
    return {"coherence": "the shop's" if "world" in read_recipe(recipe) else "of plain text"}


def inputs_of(run: Run, recipe: Path, sources: Sources | None) -> RunInputs:
    """The steps that lay out what the loop starts from: named files and models, or the recipe's toy world."""
    from gramr2.extras.toy_start import toy_inputs

    if sources:
        return prepare(run.directory, run.settings, sources)
    _, sizes = world_table(recipe)
    return toy_inputs(run.directory, sizes, run.settings, run.trainings["pretrain"])


def run_to_the_end(run: Run, inputs: RunInputs, argv: Sequence[str]) -> None:
    """The loop and its baselines. Where the loop cannot go on, what it reached is written down and shown."""
    from gramr2.extras.progress import Progress
    from gramr2.steps import NothingKept

    progress = Progress(run, inputs, self_train, baselines, STEPS)
    with progress.ends():
        beside.go_ahead(run, inputs, self_train, baselines)
        progress.side_by_side = False
        results, stopped = Results(run, inputs), None
        try:
            self_train(run, inputs, results)
            if run.settings.baselines:
                baselines(run, inputs, results)
        except NothingKept as reason:
            stopped = reason
        run.ranks.on_rank_0(lambda: finish(results, run, argv, str(stopped or "")))
        if stopped:
            raise stopped


def finish(results: Results, run: Run, argv: Sequence[str], stopped: str) -> None:
    root = run.directory.root
    with disk_errors_as_input_errors(root):
        written = results.write(stopped)
        write_report(root)
        write_cards(results, written["rows"])
    print(visible("\n".join(lines_of(written, root, with_another_seed(run, argv)))))


def with_another_seed(run: Run, argv: Sequence[str]) -> str:
    """The command that does what this one did, under another name; of two of a kind the last flag holds."""
    seed, root = run.settings.seed + 1, run.directory.root
    ranks = os.environ.get("LOCAL_WORLD_SIZE", run.ranks.size)
    start = f"torchrun --nproc_per_node={ranks}" if run.ranks.size > 1 else "python"
    words = shlex.join([*map(str, argv), "--seed", str(seed), "--name", f"{root.name}-seed-{seed}"])
    return as_started(f"{start} selftrain.py " + re.sub(r"--from[ =]\S+ ", "", words))


if __name__ == "__main__":
    run_command(main)
