"""What a second core is worth to the toy on a CPU: as a second thread, or as a second process.

    python benchmarks/threads.py [--turns 2] [--part training loop]

Everything runs on two cores, alone and beside a process that is always busy, in turns; a figure is the median
of whole commands, the import of torch included. `training` is 15 steps of the toy's prover: with one thread,
with two that spin while they wait for each other (what libgomp, the OpenMP of torch's Linux wheels, does by
itself), and with two that sleep (OMP_WAIT_POLICY=PASSIVE, as the commands set it). `loop` is the whole run of
the micro recipe, in one process and with a second one. Results go to benchmarks/results/threads.json; some
four minutes.

Left out: GPUs, and more cores than two.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common

PROVER = ["train.py", "--stage", "prover", "--steps", "15"]
MICRO = ["selftrain.py", "--recipe", str(common.ROOT / "recipes/micro.toml")]
SPINS = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}
SLEEPS = {"OMP_WAIT_POLICY": "PASSIVE"}
PARTS = {  # the words of each way, and what it adds to the environment; ratios are to the first
    "training": {
        "one thread": ([*PROVER, "--threads", "1"], SLEEPS),
        "two threads that spin": ([*PROVER, "--threads", "2"], SPINS),
        "two threads that sleep": ([*PROVER, "--threads", "2"], SLEEPS),
    },
    "loop": {
        "one process": ([*MICRO, "--no-side-by-side"], SLEEPS),
        "two processes": ([*MICRO, "--side-by-side"], SLEEPS),
    },
}


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that are always at work, while the block runs."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds(words: list[str], more: dict[str, str], world: Path) -> float:
    """A command from its start to its end, in a directory of its own in which the toy's world is linked."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "runs").mkdir()
        (Path(place) / "runs/toy-world").symlink_to(world)
        command = [sys.executable, str(common.ROOT / words[0]), *words[1:]]
        start = time.perf_counter()
        subprocess.run(command, cwd=place, env=os.environ | more, check=True, capture_output=True)
        return time.perf_counter() - start


def measure(part: str, turns: int, world: Path) -> list[dict]:
    """A row for each way, alone and beside a busy process."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(turns):
        for others in (0, 1):
            for way, (words, more) in PARTS[part].items():
                with busy(others):
                    times.setdefault((way, others), []).append(seconds(words, more, world))
                print(f"{way}, beside {others}: {times[way, others][-1]:.1f} s", file=sys.stderr)
    first = next(iter(PARTS[part]))
    return [
        {
            "part": part,
            "way": way,
            "busy": others,
            "seconds": round(statistics.median(took), 2),
            "ratio": statistics.median(a / b for a, b in zip(took, times[first, others], strict=True)),
        }
        for (way, others), took in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # what is started here inherits it
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        dry = [sys.executable, str(common.ROOT / "train.py"), *PROVER[1:], "--dry-run"]  # it makes the world
        subprocess.run(dry, cwd=place, check=True, capture_output=True)
        world = Path(place) / "runs/toy-world"
        rows = [row for part in arguments.part for row in measure(part, arguments.turns, world)]
    common.write_result("threads", {"turns": arguments.turns, "load_before": round(load, 2), "rows": rows})


if __name__ == "__main__":
    main()
