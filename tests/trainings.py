"""What the tests of training share: a small world of sums, a small checkpoint, and the driver."""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import checkpoints
import torch
from safetensors.torch import load_file

from gramr2.data import Store
from gramr2.examples import ExampleBuilder
from gramr2.settings import TrainSettings

CONFIG = {
    "batch_size": 8,
    "max_length": 700,
    "token_budget": 6000,
    "save_steps": 5,
    "save_minutes": 0.0,
    "lr": 3e-3,
}


def sums(count: int, seed: int = 0):
    """Pairs of very uneven length, with labels and rationales."""
    rng = random.Random(seed)
    for _ in range(count):
        one, two = rng.randint(1, 99), rng.randint(1, 99)
        label = rng.choice("AB")
        right, wrong = f"{one + two}{' indeed' * rng.randint(0, 20)}", str(one + two + rng.randint(1, 9))
        a, b = (right, wrong) if label == "A" else (wrong, right)
        rationale = (
            f"Feedback:\nResponse A: it says {a}.\nResponse B: it says {b}.\n\n"
            f"Comparison:\nThe sum is {one + two}.\n\nConclusion:\nResponse {label} is better."
        )
        yield {
            "question": f"What is {one} + {two}?",
            "response_a": a,
            "response_b": b,
            "label": label,
            "rationale": rationale,
        }


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(directory: Path, count: int = 48, family: str = "llama3") -> tuple[Path, Path]:
    """(model directory, data file)"""
    model = checkpoints.make_checkpoint(directory / "start", family, max_positions=2048)
    (model / "judge_prompt.txt").write_text("{question}\nA: {response_a}\nB: {response_b}")
    (model / "prover_prompt.txt").write_text("Prove {label}. {question}\nA: {response_a}\nB: {response_b}")
    data = write_rows(directory / "pairs.jsonl", sums(count))
    Store(data)  # its index is written, so that every run publishes the same number of files
    return model, data


def builder_of(stage: str, world: tuple[Path, Path], **config) -> ExampleBuilder:
    model, data = world
    return ExampleBuilder(stage, TrainSettings(**CONFIG | config), [data], model)


def job(
    out: Path, model: Path, data: Path, stage: str = "reward", config: dict | None = None, **more
) -> dict:
    more |= {"stage": stage, "config": CONFIG | (config or {})}
    return {"out": str(out), "model": str(model), "data": [str(data)], **more}


@functools.cache
def driver() -> subprocess.Popen:
    """tests/driver.py, begun once; it ends when this process does, with its standard input."""
    command = [sys.executable, str(Path(__file__).with_name("driver.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=environment)


def drive(jobs: list[dict]) -> list[dict]:
    """Runs the jobs one after the other, each in a fork of the driver."""
    results = []
    for each in jobs:
        driver().stdin.write(json.dumps(each) + "\n")
        results.append(json.loads(driver().stdout.readline()))
    return results


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """Of the model, or the adapter, that a training left."""
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def curve(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def same_bits(one: Path, other: Path) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(one: Path, other: Path) -> float:
    """Of the tensor that differs most, relative to its norm."""
    a, b = weights_of(one), weights_of(other)
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)
