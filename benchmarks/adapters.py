"""Adapters of rank 16 beside training all of a model: accuracy, seconds and memory, on the same data.

    python benchmarks/adapters.py toy                       the toy world's first reward model, three seeds
    python benchmarks/adapters.py real --model DIR --data ARGUMENTS    a published model, on real text
    python benchmarks/adapters.py steps                     what a step costs, at SmolLM2-135M's shape

`toy`: the prover of each seed writes the rationales once; both ways then train on them from the same
backbone, with the recipe's steps, and are asked once about every held-out pair. `real`: a scalar head on
SmolLM2-135M, or another model's directory, and the labelled pairs that `gramr2-data convincing-arguments`
leaves; both take the steps given here at the rate that suits each (the adapters' is ten times the other).

Each training is a process of its own, and memory is the most that it held. `steps` takes both ways' steps in
turns, in one process, and counts the processor's time, which other work on the machine hardly changes. The
results are results/adapters-toy.json, adapters-real.json and adapters-steps.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import training

from gramr2 import parallel
from gramr2.extras.evaluate import is_right
from gramr2.settings import TrainSettings

RANK = 16
WAYS = {"all of it": [], f"rank {RANK}": ["--lora-rank", str(RANK)]}


def run(*words: str | Path, cwd: Path) -> float:
    """A command of the project's → the most memory that it held, in bytes."""
    command = [sys.executable, common.ROOT / str(words[0]), *words[1:]]
    process = subprocess.Popen([*map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, words))}: {said.decode()[-2000:]}")
    return usage.ru_maxrss * 1024.0


def trained(place: Path, name: str, data: Path, model: Path, test: Path, *settings: str) -> dict:
    """One training and its test, from the files that both leave."""
    out, judged = place / name, place / f"{name}.jsonl"
    memory = run("train.py", "--data", data, "--model", model, "--out", out, *settings, cwd=place)
    run("infer.py", "--bench", "pairs", test, "--out", judged, "--model", out / "model", cwd=place)
    rows = [json.loads(line) for line in judged.read_text().splitlines()]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    saved = sum(path.stat().st_size for path in (out / "model").glob("*.safetensors"))
    return {
        "right": "".join("01"[is_right(row)] for row in rows),  # pair by pair, for paired differences
        "loss": statistics.fmean(row["loss"] for row in steps[-10:]),
        "seconds per step": statistics.median(row["seconds"] for row in steps),
        "memory": memory,
        "saved": saved,
        "steps": len(steps),
    }


def toy(place: Path, seed: int) -> dict:
    """Both ways on one seed's world."""
    loop = ["--seed", str(seed), "--until", "filter-labelled", "--no-baselines", "--no-side-by-side"]
    run("selftrain.py", "--recipe", "toy", *loop, cwd=place)
    steps = place / "runs/toy/steps"
    (kept,), (world,) = steps.glob("*-filter-labelled/kept.jsonl"), steps.glob("*-data")
    (backbone,) = steps.glob("*-world/backbone/model")
    how = ["--stage", "reward", "--recipe", str(common.ROOT / "recipes/toy.toml"), "--seed", str(seed)]
    return {
        name: trained(place, name.replace(" ", "-"), kept, backbone, world / "test.jsonl", *how, *more)
        for name, more in WAYS.items()
    }


def real(place: Path, model: Path, data: Path, seed: int, steps: int, batch: int, tests: int) -> dict:
    test = place / "test.jsonl"
    test.write_text("".join((data / "test.jsonl").read_text("utf-8").splitlines(True)[:tests]))
    how = [
        "--stage",
        "discriminative",
        "--seed",
        str(seed),
        "--steps",
        str(steps),
        "--batch-size",
        str(batch),
    ]
    how += ["--max-length", "1024", "--token-budget", "1024"]
    return {
        name: trained(place, name.replace(" ", "-"), data / "labelled.jsonl", model, test, *how, *more)
        for name, more in WAYS.items()
    }


def steps(length: int = 256, tokens: int = 1024, turns: int = 3) -> dict:
    """Both ways' steps of random weights, in turns → the median seconds of the processor for each."""
    with parallel.join_ranks(TrainSettings(device="cpu")) as ranks:
        model, how = training.LARGE["SmolLM2-135M"], {"all of it": {}, f"rank {RANK}": {"lora_rank": RANK}}
        made = {
            way: training.prepare(model, length, tokens, ranks, compiled=False, **more)
            for way, more in how.items()
        }
        seconds: dict[str, list[float]] = {way: [] for way in made}
        for _ in range(turns + 1):
            for way, (loop, rows) in made.items():
                begun = time.process_time()
                loop.step(rows)
                seconds[way].append(time.process_time() - begun)
    return {"seconds": {way: statistics.median(each[1:]) for way, each in seconds.items()}, "tokens": tokens}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("toy", "real", "steps"))
    parser.add_argument("--seeds", type=int, nargs="+", help="[toy: 0 1 2; real: 0]")
    parser.add_argument("--model", type=Path, help="real: a model's directory")
    parser.add_argument("--data", type=Path, help="real: a directory of convincing-arguments")
    parser.add_argument("--steps", type=int, default=60, help="real: [60]")
    parser.add_argument("--batch", type=int, default=4, help="real: pairs of a step [4]")
    parser.add_argument("--tests", type=int, default=200, help="real: held-out pairs [200]")
    given = parser.parse_args(argv)
    if given.what == "real" and not (given.model and given.data):
        parser.error("real: give --model and --data")
    if given.what == "steps":
        common.write_result("adapters-steps", steps())
        return
    rows = {}
    for seed in given.seeds or ([0, 1, 2] if given.what == "toy" else [0]):
        with tempfile.TemporaryDirectory() as place:
            if given.what == "toy":
                rows[str(seed)] = toy(Path(place), seed)
            else:
                sizes = given.steps, given.batch, given.tests
                rows[str(seed)] = real(Path(place), given.model.resolve(), given.data.resolve(), seed, *sizes)
        print(json.dumps({seed: rows[str(seed)]}), flush=True)
    common.write_result(f"adapters-{given.what}", {"rank": RANK, "seeds": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
