"""One command for a machine with a GPU: every check and benchmark that needs one, in ten minutes at most.

    python benchmarks/acceptance.py                          all parts, on one GPU or several
    python benchmarks/acceptance.py --part judge round       only these; the others' results stay
    python benchmarks/acceptance.py --share sampler=200      a part's seconds, of the others' if need be
    python benchmarks/acceptance.py --device cpu --quick     a rehearsal with micro models: it shows that this
                                                             script runs, and leaves no figure

Each part is a process of its own and has a share of the one deadline for all; what a part leaves of its
share goes to those behind it. A part that fails or runs out of time is written down with the end of its
output and stops no other; what a benchmark had measured by then is kept. What comes first matters most:
correctness, the launch choices of this card, which all later parts use, then the kernels, the sampler, the
trainer, the memory that it is said to take, proofs and judgments from end to end, profiles by kernel, and a
whole self-training round in bfloat16. Models have random weights.

Everything ends in benchmarks/results/acceptance.json, from which `python benchmarks/tables.py` fills the
GPU tables of the READMEs: that one file is all that has to be brought back from the machine. Exit status 0:
every part passed; 1: one did not; 2: there is no GPU here.

Left out: several nodes, published weights, and any judgment of the figures.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import common
import torch

from gramr2.extras import toyworld
from gramr2.files import read_json, write_json
from gramr2.recipes import read_recipe

BENCHMARKS, TESTS = common.ROOT / "benchmarks", common.ROOT / "tests"
MICRO = common.ROOT / "recipes/micro.toml"
TAIL = 3000  # characters that are kept of what a failed part said
GRACE = 5.0  # seconds between asking a part to stop and killing it
DEADLINE = 540.0
STARTING = 10.0  # seconds that a script may take before it works


@dataclass(frozen=True)
class Part:
    """One row of the report. `words`: what Python is started with, by (device, quick, directory, seconds)."""

    name: str
    about: str
    share: float  # seconds, of the default deadline
    words: Callable[[str, bool, Path, float], list]
    forbidden: str = ""  # a pattern that must not stand in what a part says on a GPU


def tests(device: str, quick: bool, place: Path, seconds: float) -> list:
    """Only the files that hold CUDA tests: the others would be imported for nothing."""
    marked = [path for path in sorted(TESTS.glob("test_*.py")) if "@pytest.mark.cuda" in path.read_text()]
    return ["-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "--rootdir", common.ROOT, *marked]


def tuner(device: str, quick: bool, place: Path, seconds: float) -> list:
    """Leaves its file where GRAMR2_TUNING says: the parts behind it launch their kernels by it."""
    words = [BENCHMARKS / "tune.py", "--device", device, "--seconds", max(1.0, seconds - STARTING)]
    return [*words, *(["--quick", "--out", place / "choices.json"] if quick else [])]


def ranks(device: str, quick: bool, place: Path, seconds: float) -> list:
    """Training by torchrun on every GPU there is (NCCL), from a backbone that has learnt nothing."""
    count = torch.cuda.device_count() if device == "cuda" else 2
    world = toyworld.make_world(place / "world", **micro_world())
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return [*launch, common.ROOT / "train.py", "--stage", "reward", "--recipe", MICRO, "--device", device,
            "--model", world / "backbone_init", "--data", world / "human.jsonl", "--out", place / "out",
            "--steps", 4 if quick else 40, "--save-steps", 2 if quick else 20]  # fmt: skip


def benchmark(name: str, full=(), quick=()):
    """A script of this directory: its words for a GPU, and for a rehearsal."""
    return lambda device, rehearsal, place, seconds: [
        BENCHMARKS / f"{name}.py", "--device", device, *(["--quick", *quick] if rehearsal else full)
    ]  # fmt: skip


def whole_round(device: str, quick: bool, place: Path, seconds: float) -> list:
    """selftrain.py with the micro recipe, which on a GPU trains and samples in bfloat16."""
    return [common.ROOT / "selftrain.py", "--recipe", MICRO, *(["--no-baselines"] if quick else [])]


def micro_world() -> dict:
    return {key: value for key, value in read_recipe(MICRO)["world"].items() if key != "directory"}


PARTS = [  # the shares make up the default deadline
    Part("tests", "every test that needs a GPU", 65, tests, forbidden=r"\d+ skipped"),
    Part("tuner", "launch choices of the kernels on this card", 50, tuner),
    Part("ranks", "torchrun, a rank on each GPU", 25, ranks),
    Part(
        "kernels",
        "sequence log-prob, three published heads",
        60,
        benchmark("sequence_logprob", ["--repeats", 3], ["--repeats", 1, "--ways", "ours"]),
    ),
    Part(
        "sampler",
        "decode steps of an 8B model, and grouped prefixes",
        65,
        benchmark("sampling", ["--no-continuous"], ["--no-continuous"]),
    ),
    Part("trainer", "training steps at 3B, 135M, 0.5B and, where it fits, 8B", 45, benchmark("training")),
    Part("memory", "the memory told beforehand, within a tenth of the peak", 30, benchmark("memory")),
    Part(
        "compiled",
        "the same with compiled blocks, small models first",
        60,
        benchmark(
            "training",
            ["--compile", "--shapes", "SmolLM2-135M", "Qwen2.5-0.5B", "LLaMA-3.2-3B"],
            ["--compile"],
        ),
    ),
    Part(
        "endtoend",
        "proofs and judgments of a 135M model",
        30,
        benchmark("endtoend", quick=["--repeats", 1]),
    ),
    Part("profiles", "decode and training steps by kernel", 35, benchmark("profiles")),
    Part("round", "a self-training round in bfloat16", 35, whole_round),
    Part("judge", "pairs per second with 1, 4 and 16 votes", 30, benchmark("judging", ["--repeats", 1])),
    Part("scorer", "log-probs of a 1B model", 10, benchmark("forward", ["--repeats", 2], ["--repeats", 1])),
]


def ends(shares: list[float], deadline: float) -> list[float]:
    """When each part has to be done: its share after the one before. All shrink alike where they are too much
    for the deadline, and grow with one that is longer than the default."""
    scale = min(deadline / sum(shares), max(1.0, deadline / DEADLINE))
    return [scale * end for end in accumulate(shares)]


def run(part: Part, arguments: argparse.Namespace, limit: float) -> tuple[dict, dict]:
    """-> (the part's row, the results that it left by their names)."""
    if limit < 1:
        return {"part": part.name, "status": "not started", "seconds": 0.0, "said": "the deadline"}, {}
    print(f"{part.name}: {part.about}, {limit:.0f} s at most …", file=sys.stderr, flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        words = part.words(arguments.device, arguments.quick, place, limit)
        command = [sys.executable, *map(str, words)]
        status, said = bounded(command, place, limit)
        results = {path.stem: read_json(path) for path in sorted((place / "results").glob("*.json"))}
    if (
        status == "passed"
        and part.forbidden
        and arguments.device == "cuda"
        and re.search(part.forbidden, said)
    ):
        status = "failed"
    row = {"part": part.name, "status": status, "seconds": round(time.perf_counter() - started, 1)}
    return row | ({} if status == "passed" else {"said": said[-TAIL:], "command": command}), results


def bounded(command: list[str], place: Path, limit: float) -> tuple[str, str]:
    """Runs a command and all that it starts for `limit` seconds at most. → (status, what it said)."""
    environment = os.environ | {"GRAMR2_RESULTS": str(place / "results"), "PYTHONUNBUFFERED": "1"}
    environment |= {"PYTHONPATH": str(common.ROOT), "GRAMR2_TUNING": str(common.RESULTS / "choices.json")}
    log = place / "log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=place, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = "passed" if child.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            stop(child)
    return status, log.read_text(encoding="utf-8", errors="replace")


def stop(child: subprocess.Popen) -> None:
    """Whatever is left of a part: it was started as a group of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def share(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in {part.name for part in PARTS}:
        raise argparse.ArgumentTypeError(f"no part is called {name}")
    return name, float(seconds)


def show(rows: list[dict]) -> None:
    for row in rows:
        about = next(part.about for part in PARTS if part.name == row["part"])
        print(f"{row['part']:9}{row['status']:12}{row['seconds']:7.1f} s  {about}")
    for row in (row for row in rows if row["status"] == "failed"):
        print(f"\n{row['part']} said at its end:\n{row['said'].strip()[-1000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--part", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="micro models: a rehearsal, without figures")
    for_all = f"seconds for all parts (default: {DEADLINE:.0f})"
    parser.add_argument("--deadline", type=float, default=DEADLINE, help=for_all)
    of_one = {"nargs": "+", "type": share, "default": [], "metavar": "NAME=SECONDS"}
    parser.add_argument("--share", **of_one, help="another share for a part")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU here; rehearse with --device cpu --quick", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu is for rehearsals: add --quick")
    name = "acceptance_quick" if arguments.quick else "acceptance"
    place = common.RESULTS / f"{name}.json"
    before = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {"parts": [], "results": {}}
    rows, results = {row["part"]: row for row in before["parts"]}, before["results"]
    started, environment = time.perf_counter(), common.environment()
    parts = [part for part in PARTS if part.name in arguments.part]
    shares = [dict(arguments.share).get(part.name, part.share) for part in parts]
    for part, end in zip(parts, ends(shares, arguments.deadline), strict=True):
        row, found = run(part, arguments, end - (time.perf_counter() - started))
        rows[part.name] = row | {"gpu": environment["gpu"], "commit": environment["commit"]}
        results |= found
        for each, result in found.items() if not arguments.quick else ():
            write_json(common.RESULTS / f"{each}.json", result)
        # After each part, so that an interrupted call has written down what is done.
        ordered = [rows[part] for part in names if part in rows]
        common.write_result(name, {"parts": ordered, "results": results})
    asked = [rows[part] for part in names if part in arguments.part]
    show(asked)
    return 0 if all(row["status"] == "passed" for row in asked) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a part never outlives this script
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
