"""AdamW's moments in bfloat16 beside float32: what it does to the loss, to memory and to a step's time.

    python benchmarks/optimizer.py toy                        the toy's model on made pairs: some ten minutes
    python benchmarks/optimizer.py smollm2 --model DIR --data convincing-arguments/human.jsonl
                                                              a published model on real text: half an hour

The same training, equation 2, from the same weights on the same batches, once for each kind of moments and
each seed (which decides the batches too). `loss` is that of rows held out of the training, after its last
step. What is asked is whether the difference that bfloat16 makes stands out of the difference that another
seed makes. For the toy also with moments that are rounded to nearest: what stochastic rounding is there
to prevent. An update is also timed alone. Bytes are what the tensors hold: weights, gradients and moments.
Rows that stand in the result are not measured again; what stands there of the other part stays.

Left out: accuracies, long trainings, and GPUs, where a step's share that is the optimizer's is another.
"""

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import common
import torch
from tqdm import tqdm

from gramr2 import fit, optimizer, parallel
from gramr2.data import Store
from gramr2.examples import ExampleBuilder
from gramr2.extras import toyworld
from gramr2.files import write_rows
from gramr2.loss import OBJECTIVES, collate
from gramr2.plan import make_plan, read_model_config
from gramr2.recipes import RECIPES, resolve
from gramr2.settings import TrainSettings

STAGE, ALONE = "reward", parallel.Ranks(0, 1, torch.device("cpu"))
WAYS = {"float32": "float32", "bfloat16": "bfloat16", "bfloat16, rounded to nearest": "bfloat16"}
TOY = {"human": 200}  # pairs with a rationale: of the world, and of those the ones that are held out
SMOLLM2 = {"prompt": "short", "batch_size": 2, "max_length": 384, "token_budget": 768, "lr": 1e-4}
PARTS = {  # the rows that are held out, the seeds, the ways
    "toy": (80, range(3), [*WAYS]),
    "smollm2": (24, range(2), [*WAYS][:2]),
}


def nearest(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16)


def measure(way: str, settings: TrainSettings, model: Path, files: list[Path]) -> dict:
    """One training on the first file; the loss on the second."""
    settings = dataclasses.replace(settings, optimizer_dtype=WAYS[way])
    builder, held = (ExampleBuilder(STAGE, settings, [file], model) for file in files)
    config = read_model_config(STAGE, "vocabulary", settings, model, builder.tokenizer)
    plan = make_plan(builder, settings, ALONE)
    objective = OBJECTIVES[builder.stage.objective](settings)
    trainee = fit.make_trainee(objective, settings, config, model, ALONE)
    loop = fit.Loop(trainee, settings, ALONE, Path(tempfile.gettempdir()), plan.steps)
    seconds, rule = [], nearest if "nearest" in way else optimizer.rounded
    with patch.object(optimizer, "rounded", rule):
        for step in tqdm(range(plan.steps), f"{way}, seed {settings.seed}", mininterval=10):
            start = time.perf_counter()
            loop.step([builder(*use) for use in plan.step(step)])
            seconds.append(time.perf_counter() - start)
    examples = [held.plain(row) for row in range(held.size)]
    examples = [example for example in examples if example.length <= settings.max_length]
    units = sum(example.units for example in examples)
    with torch.no_grad():
        loss = sum(float(trainee(collate([each], 1 / units, "cpu"))) for each in examples)
    parameters = sum(each.numel() for each in loop.weights)
    held_bytes = 2 * sum(each.nbytes for each in loop.weights)  # a weight's gradient is as large
    held_bytes += sum(tensor.nbytes for name, tensor in loop.state.items() if name.startswith("exp_avg"))
    return {
        "loss": loss,
        "seconds": median(seconds),
        "bytes": held_bytes / parameters,
        "steps": plan.steps,
        "held_out": len(examples),
    }


def updates() -> dict[str, dict]:
    """An update alone, of a matrix of four million parameters, in turns."""
    weights = {dtype: torch.nn.Parameter(torch.zeros(4096, 1024)) for dtype in dict.fromkeys(WAYS.values())}
    steps = {}
    for dtype, weight in weights.items():
        weight.grad = torch.randn_like(weight)
        steps[dtype] = optimizer.make_optimizer([weight], TrainSettings(optimizer_dtype=dtype)).step
    timings = common.compare(steps, 15)
    return {dtype: each | {"ns": each["seconds"] / (4096 * 1024) * 1e9} for dtype, each in timings.items()}


def inputs(part: str, arguments: argparse.Namespace, place: Path) -> tuple[TrainSettings, Path, list[Path]]:
    """-> (settings, the model, the rows of the training and those that are held out)."""
    if part == "toy":
        recipe = RECIPES / "toy.toml"
        sizes = toyworld.world_table(recipe)[1] | TOY
        world = toyworld.make_world(place / "world", **sizes)
        settings = resolve(TrainSettings, recipe, ["train"], {"steps": arguments.steps or 150})
        model, data = world / "backbone/model", world / "human.jsonl"
    else:
        settings = TrainSettings(**SMOLLM2, steps=arguments.steps or 16)
        model, data = arguments.model, arguments.data
    rows, held = list(Store(data)), PARTS[part][0]
    files = [place / name for name in ("train.jsonl", "held.jsonl")]
    for file, some in zip(files, (rows[held:], rows[:held]), strict=True):
        write_rows(file, some)
    return settings, model, files


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", type=Path, help="smollm2: its directory")
    parser.add_argument("--data", type=Path, help="smollm2: pairs with a label and a human rationale")
    parser.add_argument("--steps", type=int, help="[150 for the toy, 16 for smollm2]")
    arguments = parser.parse_args()
    if arguments.part == "smollm2" and not (arguments.model and arguments.data):
        parser.error("smollm2 needs --model and --data")
    torch.set_num_threads(1)
    parts = common.kept_results("optimizer", "parts")
    with tempfile.TemporaryDirectory() as directory:
        settings, model, files = inputs(arguments.part, arguments, Path(directory))
        _, seeds, ways = PARTS[arguments.part]
        rows = parts[arguments.part] = parts.get(arguments.part, [])
        for seed, way in itertools.product(seeds, ways):
            if any((row["seed"], row["way"]) == (seed, way) for row in rows):
                continue
            found = measure(way, dataclasses.replace(settings, seed=seed), model, files)
            rows.append({"way": way, "seed": seed, **found})
            common.write_result("optimizer", {"parts": parts})  # after each: half an hour is long
    common.write_result("optimizer", {"parts": parts, "updates": updates()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
